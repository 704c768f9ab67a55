//! Where RAM lies in the guest's physical address space.
//!
//! RAM fills the address space from 0 upwards and steps over two holes: one below 4 GiB for devices with 32-bit
//! addresses, one from 256 GiB to 512 GiB for PCI devices with 64-bit windows. The addresses are Firecracker's, so a
//! guest image tuned to one layout finds the same one here.

/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One gibibyte.
pub const GIB: u64 = 1 << 30;

/// Start of the hole for 32-bit devices: RAM below it ends here.
pub const MMIO32_START: u64 = 3 * GIB;
/// End of the hole for 32-bit devices (exclusive): RAM goes on here.
pub const MMIO32_END: u64 = 4 * GIB;
/// Start of the hole for 64-bit device windows.
pub const MMIO64_START: u64 = 256 * GIB;
/// End of the hole for 64-bit device windows (exclusive).
pub const MMIO64_END: u64 = 512 * GIB;

/// The spans that RAM may fill, in order, as `(start, end)` with the end exclusive.
const RAM_SPANS: [(u64, u64); 3] = [
    (0, MMIO32_START),
    (MMIO32_END, MMIO64_START),
    (MMIO64_END, MMIO64_END + config::MAX_MEM_SIZE_MIB as u64 * MIB),
];

/// A stretch of guest-physical addresses that is RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamSpan {
    /// First guest-physical address.
    pub start: u64,
    /// Length in bytes; never 0.
    pub size: u64,
}

impl RamSpan {
    /// One past the last guest-physical address.
    pub fn end(&self) -> u64 {
        self.start + self.size
    }
}

/// Splits `mem_size_mib` mebibytes of RAM over the spans between the holes, lowest addresses first.
///
/// `mem_size_mib` is at most [`config::MAX_MEM_SIZE_MIB`] (the configuration checks it); what exceeds all spans together
/// is not placed.
pub fn ram_spans(mem_size_mib: u32) -> Vec<RamSpan> {
    let mut left = u64::from(mem_size_mib) * MIB;
    let mut spans = Vec::new();
    for (start, end) in RAM_SPANS {
        let size = left.min(end - start);
        if size > 0 {
            spans.push(RamSpan { start, size });
        }
        left -= size;
    }
    spans
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn small_guest_is_one_span_from_zero() {
        assert_eq!(ram_spans(128), [RamSpan { start: 0, size: 128 * MIB }]);
    }

    #[test]
    fn ram_steps_over_the_32_bit_hole() {
        assert_eq!(
            ram_spans(5 * 1024),
            [RamSpan { start: 0, size: 3 * GIB }, RamSpan { start: 4 * GIB, size: 2 * GIB }]
        );
    }

    #[test]
    fn exactly_three_gib_needs_no_second_span() {
        assert_eq!(ram_spans(3 * 1024), [RamSpan { start: 0, size: 3 * GIB }]);
    }

    proptest! {
        #[test]
        fn spans_hold_all_ram_in_order_outside_the_holes(mib in 1..=config::MAX_MEM_SIZE_MIB) {
            let spans = ram_spans(mib);
            prop_assert_eq!(spans.iter().map(|s| s.size).sum::<u64>(), u64::from(mib) * MIB);
            for s in &spans {
                prop_assert!(s.end() <= MMIO32_START || s.start >= MMIO32_END);
                prop_assert!(s.end() <= MMIO64_START || s.start >= MMIO64_END);
                prop_assert_eq!(s.start % (2 * MIB), 0);
            }
            prop_assert!(spans.windows(2).all(|w| w[0].end() <= w[1].start));
        }
    }
}
