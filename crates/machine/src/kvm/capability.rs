//! The KVM capabilities that the host must have.

use config::KvmCapability;
use kvm_ioctls::Cap;

use super::error::KvmError;

/// Capabilities with the names of their constants.
macro_rules! named {
    ($($name:ident),* $(,)?) => { [$((kvm_bindings::$name, stringify!($name))),*] };
}

/// The capabilities that every guest needs.
const REQUIRED: [Cap; 13] = [
    Cap::Irqchip,
    Cap::Ioeventfd,
    Cap::Irqfd,
    Cap::UserMemory,
    Cap::SetTssAddr,
    Cap::Pit2,
    Cap::ImmediateExit,
    Cap::Debugregs,
    Cap::MpState,
    Cap::VcpuEvents,
    Cap::Xcrs,
    Cap::Xsave,
    Cap::ExtCpuid,
];

/// The names of capabilities for messages: those that are required, and those that a CPU template
/// may well add.
const NAMES: [(u32, &str); 60] = named![
    KVM_CAP_IRQCHIP,
    KVM_CAP_HLT,
    KVM_CAP_USER_MEMORY,
    KVM_CAP_SET_TSS_ADDR,
    KVM_CAP_VAPIC,
    KVM_CAP_EXT_CPUID,
    KVM_CAP_CLOCKSOURCE,
    KVM_CAP_NR_VCPUS,
    KVM_CAP_NR_MEMSLOTS,
    KVM_CAP_PIT,
    KVM_CAP_MP_STATE,
    KVM_CAP_SYNC_MMU,
    KVM_CAP_USER_NMI,
    KVM_CAP_SET_GUEST_DEBUG,
    KVM_CAP_REINJECT_CONTROL,
    KVM_CAP_IRQ_ROUTING,
    KVM_CAP_MCE,
    KVM_CAP_IRQFD,
    KVM_CAP_PIT2,
    KVM_CAP_PIT_STATE2,
    KVM_CAP_IOEVENTFD,
    KVM_CAP_SET_IDENTITY_MAP_ADDR,
    KVM_CAP_ADJUST_CLOCK,
    KVM_CAP_VCPU_EVENTS,
    KVM_CAP_HYPERV,
    KVM_CAP_INTR_SHADOW,
    KVM_CAP_DEBUGREGS,
    KVM_CAP_ENABLE_CAP,
    KVM_CAP_XSAVE,
    KVM_CAP_XCRS,
    KVM_CAP_ASYNC_PF,
    KVM_CAP_TSC_CONTROL,
    KVM_CAP_GET_TSC_KHZ,
    KVM_CAP_MAX_VCPUS,
    KVM_CAP_TSC_DEADLINE_TIMER,
    KVM_CAP_SYNC_REGS,
    KVM_CAP_KVMCLOCK_CTRL,
    KVM_CAP_SIGNAL_MSI,
    KVM_CAP_READONLY_MEM,
    KVM_CAP_IRQFD_RESAMPLE,
    KVM_CAP_EXT_EMUL_CPUID,
    KVM_CAP_CHECK_EXTENSION_VM,
    KVM_CAP_X86_SMM,
    KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_IOEVENTFD_ANY_LENGTH,
    KVM_CAP_X2APIC_API,
    KVM_CAP_IMMEDIATE_EXIT,
    KVM_CAP_X86_DISABLE_EXITS,
    KVM_CAP_GET_MSR_FEATURES,
    KVM_CAP_NESTED_STATE,
    KVM_CAP_MSR_PLATFORM_INFO,
    KVM_CAP_EXCEPTION_PAYLOAD,
    KVM_CAP_X86_USER_SPACE_MSR,
    KVM_CAP_X86_MSR_FILTER,
    KVM_CAP_DIRTY_LOG_RING,
    KVM_CAP_SREGS2,
    KVM_CAP_XSAVE2,
    KVM_CAP_PMU_CAPABILITY,
    KVM_CAP_VM_TSC_CONTROL,
    KVM_CAP_X86_TRIPLE_FAULT_EVENT,
];

/// Checks that the host `has` the required capabilities, which a CPU template may change.
pub(super) fn check(changes: &[KvmCapability], has: impl Fn(u32) -> bool) -> Result<(), KvmError> {
    let required = REQUIRED.map(|cap| cap as u32);
    let ignored = |number: &u32| changes.contains(&KvmCapability::Ignore(*number));
    let missing = required.into_iter().find(|number| !ignored(number) && !has(*number));
    if let Some(number) = missing {
        return Err(KvmError::Missing(name(number)));
    }
    let added = changes.iter().filter_map(|change| match change {
        KvmCapability::Require(number) => Some(*number),
        KvmCapability::Ignore(_) => None,
    });
    let missing: Vec<_> = added.filter(|number| !has(*number)).collect();
    if missing.is_empty() { Ok(()) } else { Err(KvmError::MissingOfTemplate(list(&missing))) }
}

fn name(number: u32) -> &'static str {
    NAMES.iter().find(|(of, _)| *of == number).map_or("an unnamed capability", |(_, name)| name)
}

/// The names and numbers of capabilities.
fn list(numbers: &[u32]) -> String {
    numbers.iter().map(|number| format!("{} ({number})", name(*number))).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPLIT: u32 = 121;
    const XCRS: u32 = 56;

    #[test]
    fn required_capabilities_have_names() {
        for cap in REQUIRED {
            assert!(name(cap as u32).starts_with("KVM_CAP_"), "{cap:?}");
        }
        let error = check(&[], |number| number != XCRS).unwrap_err().to_string();
        assert_eq!(error, "this host's KVM lacks KVM_CAP_XCRS");
    }

    #[test]
    fn template_adds_and_removes_capabilities() {
        assert!(check(&[], |_| true).is_ok());
        assert!(check(&[KvmCapability::Ignore(XCRS)], |number| number != XCRS).is_ok());
        assert!(check(&[KvmCapability::Require(SPLIT)], |_| true).is_ok());
        let changes = [KvmCapability::Require(SPLIT), KvmCapability::Require(9999)];
        let error = check(&changes, |number| number < 100).unwrap_err();
        // A required one that is missing is reported first.
        assert!(matches!(error, KvmError::Missing("KVM_CAP_IMMEDIATE_EXIT")), "{error}");
        let error = check(&changes, |number| number != SPLIT && number != 9999).unwrap_err().to_string();
        assert_eq!(
            error,
            "cpu-config: kvm_capabilities: this host's KVM lacks KVM_CAP_SPLIT_IRQCHIP (121), \
             an unnamed capability (9999)"
        );
    }
}
