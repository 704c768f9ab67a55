//! The two PICs, before a guest programs them.
//!
//! KVM creates its PICs with every line enabled and with interrupt vectors from 0 on, which are
//! those of exceptions. The first vCPU's LINT0 takes what they deliver. A restored machine raises
//! interrupts before its guest may have programmed the PICs: always that of the generic event
//! device. So all lines of a PIC are masked until the guest initialises it, as firmware leaves a
//! PIC. This includes a PIC in a state that was saved without the mask.

use std::mem::offset_of;

use kvm_bindings::{KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pic_state};
use kvm_ioctls::VmFd;
use zerocopy::{FromBytes, IntoBytes};

use super::error::{Ioctl, KvmError};

/// Masks all lines of both PICs of `vm`, which no guest has programmed.
pub(super) fn mask_new_pics(vm: &VmFd) -> Result<(), KvmError> {
    for id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
        let mut chip = get_irqchip(vm, id)?;
        mask_unprogrammed_pic(&mut chip);
        vm.set_irqchip(&chip).ioctl("KVM_SET_IRQCHIP")?;
    }
    Ok(())
}

/// The state of an interrupt controller, by its ID in KVM.
pub(crate) fn get_irqchip(vm: &VmFd, chip_id: u32) -> Result<kvm_irqchip, KvmError> {
    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
    vm.get_irqchip(&mut chip).ioctl("KVM_GET_IRQCHIP")?;
    Ok(chip)
}

/// Masks all lines of a PIC that is as KVM creates it. Changes no other chip.
pub(crate) fn mask_unprogrammed_pic(chip: &mut kvm_irqchip) {
    let Some(pic) = pic_state(chip) else { return };
    // The guest's first initialization command word sets `init4` or `init_state`, the second sets
    // `irq_base`.
    let programmed = pic.init4 != 0 || pic.init_state != 0 || pic.irq_base != 0;
    if !programmed && pic.imr == 0 {
        chip.chip.pic.imr = 0xff;
    }
}

/// The registers of a PIC; `None` for another chip.
pub(crate) fn pic_state(chip: &kvm_irqchip) -> Option<kvm_pic_state> {
    let is_pic = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE].contains(&chip.chip_id);
    let registers = &chip.as_bytes()[offset_of!(kvm_irqchip, chip)..];
    is_pic.then(|| kvm_pic_state::read_from_prefix(registers).expect("the union holds a PIC").0)
}

#[cfg(test)]
mod tests {
    use kvm_bindings::KVM_IRQCHIP_IOAPIC;

    use super::*;

    #[test]
    fn only_an_unprogrammed_pic_is_masked() {
        let masked = |registers| {
            let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_PIC_SLAVE, ..Default::default() };
            chip.chip.pic = registers;
            mask_unprogrammed_pic(&mut chip);
            pic_state(&chip).unwrap()
        };
        let fresh = kvm_pic_state { elcr_mask: 0xde, irr: 8, ..Default::default() };
        assert_eq!(masked(fresh), kvm_pic_state { imr: 0xff, ..fresh });
        for programmed in [
            kvm_pic_state { imr: 0xfe, ..fresh },
            kvm_pic_state { init_state: 1, ..fresh },
            kvm_pic_state { init4: 1, ..fresh },
            kvm_pic_state { irq_base: 0x30, ..fresh },
        ] {
            assert_eq!(masked(programmed), programmed);
        }
    }

    #[test]
    fn the_io_apic_is_not_masked_like_a_pic() {
        let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        mask_unprogrammed_pic(&mut chip);
        assert!(chip.as_bytes()[8..].iter().all(|byte| *byte == 0));
    }
}
