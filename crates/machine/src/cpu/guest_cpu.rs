//! [`GuestCpu`]: what the vCPUs of a new guest show, set on them in the order of
//! [`super::template`].

use config::{CpuConfig, MachineConfig};
use kvm_ioctls::VcpuFd;

use super::cpuid::{Cpuid, HostCpuid};
use super::msrs::set_boot_msrs;
use super::template::{Template, TemplateError};
use super::topology::Topology;
use crate::kvm::{Ioctl, Kvm};

/// What the vCPUs of a new guest show.
#[derive(Debug)]
pub(crate) struct GuestCpu<'a> {
    cpuid: Cpuid,
    /// The template, and CPUID without it.
    template: Option<(Template<'a>, Cpuid)>,
}

impl<'a> GuestCpu<'a> {
    /// The vCPUs of `machine` with its static template, or with the `custom` one.
    pub(crate) fn new(
        kvm: &Kvm,
        machine: &MachineConfig,
        custom: Option<&'a CpuConfig>,
    ) -> Result<Self, TemplateError> {
        let host = HostCpuid::read(kvm)?;
        let topology = Topology::new(machine.vcpu_count, machine.smt);
        let normal = host.cpuid(topology);
        Ok(match Template::choose(machine, custom, &host)? {
            Some(template) => {
                let cpuid = template.cpuid(&host, topology, &normal)?;
                GuestCpu { cpuid, template: Some((template, normal)) }
            }
            None => GuestCpu { cpuid: normal, template: None },
        })
    }

    /// CPUID.
    pub(crate) fn cpuid(&self) -> &Cpuid {
        &self.cpuid
    }

    /// The MSRs that the template changes.
    pub(crate) fn template_msrs(&self) -> Vec<u32> {
        self.template.iter().flat_map(|(template, _)| template.msr_addresses()).collect()
    }

    /// Sets CPUID and MSRs of new `vcpus`, in order of their numbers.
    pub(crate) fn set_up(&self, vcpus: &[VcpuFd]) -> Result<(), TemplateError> {
        if let (Some((template, normal)), Some(first)) = (&self.template, vcpus.first()) {
            template.check_features(normal, &self.cpuid, first)?;
        }
        for (id, vcpu) in (0..).zip(vcpus) {
            // CPUID first: it decides which registers a vCPU has.
            vcpu.set_cpuid2(&self.cpuid.for_vcpu(id)?).ioctl("KVM_SET_CPUID2")?;
            if let Some((template, _)) = &self.template {
                template.set_msrs(vcpu)?;
            }
            set_boot_msrs(vcpu)?;
        }
        Ok(())
    }
}
