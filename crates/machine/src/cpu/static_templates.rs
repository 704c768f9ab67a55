//! The CPU templates that have names: C3, T2, T2S, T2CL and T2A, as tables.
//!
//! Their effect is Firecracker's, so that a fleet may have guests of both. T2 shows an Intel
//! Haswell, C3 an Ivy Bridge, each without the features that the cloud instances of these names
//! lack. T2S also hides what differs between the mitigations of Skylake and Cascade Lake. T2CL and
//! T2A show the same instructions on Intel and on AMD.
//!
//! Bits are named as in the Intel SDM, volume 2, CPUID, and the AMD APM, volume 3, appendix E.

use config::CpuidRegister::{self, Eax, Ebx, Ecx, Edx};
use config::{Bitmap, CpuConfig, CpuTemplate, CpuidModifier, MsrModifier, RegisterModifier};

/// Bits of a register that are set and cleared. Others stay.
type Change = (CpuidRegister, u32, u32);

/// The changes of a leaf: its number, its index, whether it has several, its registers.
struct Leaf(u32, u32, bool, &'static [Change]);

/// A bit of the register.
macro_rules! bits {
    ($($name:ident = $bit:literal),* $(,)?) => { $(const $name: u32 = 1 << $bit;)* };
}

// Leaf 1, eax: stepping, model, type and family.
const SIGNATURE: u32 = 0x0fff_3fff;
const HASWELL: u32 = 0x306f2;
const IVY_BRIDGE: u32 = 0x306e4;

// Leaf 1, ecx.
bits! {
    DTES64 = 2, MONITOR = 3, DS_CPL = 4, VMX = 5, SMX = 6, EIST = 7, TM2 = 8, CNXT_ID = 10, SDBG = 11,
    FMA = 12, XTPR = 14, PDCM = 15, DCA = 18, MOVBE = 22,
}
const DEBUG_AND_POWER: u32 = DTES64 | MONITOR | DS_CPL | VMX | TM2 | CNXT_ID | SDBG | XTPR | PDCM;

// Leaf 1, edx.
bits! { MCE = 7, MTRR = 12, PSN = 18, DS = 21, ACPI = 22, SS = 27, TM = 29, IA64 = 30, PBE = 31 }
const OF_A_MACHINE: u32 = PSN | DS | ACPI | SS | TM | PBE;

// Leaf 7, ebx.
bits! {
    SGX = 2, BMI1 = 3, HLE = 4, AVX2 = 5, BMI2 = 8, ERMS = 9, INVPCID = 10, RTM = 11, RDT_M = 12,
    MPX = 14, RDT_A = 15, AVX512F = 16, AVX512DQ = 17, RDSEED = 18, ADX = 19, AVX512_IFMA = 21,
    PCOMMIT = 22, CLFLUSHOPT = 23, CLWB = 24, PT = 25, AVX512PF = 26, AVX512ER = 27, AVX512CD = 28,
    SHA = 29, AVX512BW = 30, AVX512VL = 31,
}
const AFTER_HASWELL: u32 = SGX
    | HLE
    | RTM
    | RDT_M
    | MPX
    | RDT_A
    | RDSEED
    | ADX
    | CLFLUSHOPT
    | CLWB
    | PT
    | SHA
    | AVX512F
    | AVX512DQ
    | AVX512_IFMA
    | AVX512PF
    | AVX512ER
    | AVX512CD
    | AVX512BW
    | AVX512VL;

// Leaf 7, ecx.
bits! {
    AVX512_VBMI = 1, UMIP = 2, PKU = 3, OSPKE = 4, AVX512_VBMI2 = 6, GFNI = 8, VAES = 9, VPCLMULQDQ = 10,
    AVX512_VNNI = 11, AVX512_BITALG = 12, AVX512_VPOPCNTDQ = 14, LA57 = 16, RDPID = 22, SGX_LC = 30,
}
const OF_SKYLAKE: u32 =
    AVX512_VBMI | UMIP | PKU | OSPKE | AVX512_VNNI | AVX512_VPOPCNTDQ | LA57 | RDPID | SGX_LC;
const OF_ICE_LAKE: u32 = AVX512_VBMI2 | GFNI | VAES | VPCLMULQDQ | AVX512_BITALG;

// Leaf 7, edx.
bits! { AVX512_4VNNIW = 2, AVX512_4FMAPS = 3, FSRM = 4, AVX512_VP2INTERSECT = 8 }

// Leaf 0xd: state components 3 and 4, 5 to 7, and 9.
const MPX_STATE: u32 = 0x18;
const AVX512_STATE: u32 = 0xe0;
const PKRU_STATE: u32 = 0x200;
bits! { XSAVEC = 1, XGETBV_1 = 2, XSAVES = 3 }

// Leaf 0x8000_0001, ecx and edx.
bits! { SVM = 2, LZCNT = 5, SSE4A = 6, MISALIGNED_SSE = 7, PREFETCHW = 8, MONITORX = 29 }
bits! { MMXEXT = 22, AMD_MMX = 23, AMD_FXSR = 24, FFXSR = 25, PDPE1GB = 26 }

// Leaf 0x8000_0008, ebx.
bits! {
    CLZERO = 0, RSTR_FP_ERR_PTRS = 2, WBNOINVD = 9, IBRS_PREFERRED = 18, IBRS_SAME_MODE = 19,
    EFER_LMSLE_UNSUPPORTED = 20,
}

const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
/// What T2S shows of mitigations: RSBA, SKIP_L1DFL_VMENTRY, IF_PSCHANGE_MC_NO, MISC_PACKAGE_CTLS,
/// ENERGY_FILTERING_CTL, FB_CLEAR, RRSBA, GDS_NO and RFDS_NO. Everything else counts as missing.
const MITIGATIONS_OF_T2S: u64 =
    1 << 2 | 1 << 3 | 1 << 6 | 1 << 10 | 1 << 11 | 1 << 17 | 1 << 19 | 1 << 26 | 1 << 27;
/// What T2CL lets through of the host's: bits 0 to 8, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, FB_CLEAR,
/// RRSBA, PBRSB_NO, GDS_NO, RFDS_NO and RFDS_CLEAR.
const MITIGATIONS_FOR_T2CL: u64 =
    0x1ff | 0x7 << 13 | 1 << 17 | 1 << 19 | 1 << 24 | 1 << 26 | 1 << 27 | 1 << 28;

const T2_LEAVES: [Leaf; 4] = [
    Leaf(
        0x1,
        0,
        false,
        &[
            (Eax, HASWELL, SIGNATURE & !HASWELL),
            (Ecx, 0, DEBUG_AND_POWER | SMX | EIST | DCA),
            (Edx, MCE | MTRR, OF_A_MACHINE | IA64),
        ],
    ),
    Leaf(
        0x7,
        0,
        true,
        &[
            (Ebx, ERMS, AFTER_HASWELL | PCOMMIT),
            (Ecx, 0, OF_SKYLAKE | OF_ICE_LAKE),
            (Edx, 0, AVX512_4VNNIW | AVX512_4FMAPS | FSRM | AVX512_VP2INTERSECT),
        ],
    ),
    STATE_COMPONENTS,
    XSAVE_INSTRUCTIONS,
];
const STATE_COMPONENTS: Leaf = Leaf(0xd, 0, true, &[(Eax, 0, MPX_STATE | AVX512_STATE | PKRU_STATE)]);
const XSAVE_INSTRUCTIONS: Leaf = Leaf(0xd, 1, true, &[(Eax, 0, XSAVEC | XGETBV_1 | XSAVES)]);

const T2_EXTENDED: [Leaf; 2] = [
    Leaf(0x8000_0001, 0, false, &[(Ecx, 0, PREFETCHW | MONITORX), (Edx, 0, PDPE1GB)]),
    Leaf(0x8000_0008, 0, false, &[(Ebx, 0, WBNOINVD)]),
];

const T2CL_EXTENDED: [Leaf; 2] = [
    Leaf(
        0x8000_0001,
        0,
        false,
        &[
            (Ecx, 0, SSE4A | MISALIGNED_SSE | PREFETCHW | MONITORX),
            (Edx, 0, MMXEXT | AMD_MMX | AMD_FXSR | FFXSR | PDPE1GB),
        ],
    ),
    Leaf(0x8000_0008, 0, false, &[(Ebx, 0, WBNOINVD)]),
];

const T2A_EXTENDED: [Leaf; 2] = [
    Leaf(
        0x8000_0001,
        0,
        false,
        &[(Ecx, 0, SVM | SSE4A | MISALIGNED_SSE | PREFETCHW | MONITORX), (Edx, 0, MMXEXT | FFXSR | PDPE1GB)],
    ),
    Leaf(
        0x8000_0008,
        0,
        false,
        &[(
            Ebx,
            RSTR_FP_ERR_PTRS | IBRS_PREFERRED | IBRS_SAME_MODE | EFER_LMSLE_UNSUPPORTED,
            CLZERO | WBNOINVD,
        )],
    ),
];

const C3_LEAVES: [Leaf; 5] = [
    Leaf(
        0x1,
        0,
        false,
        &[
            (Eax, IVY_BRIDGE, SIGNATURE & !IVY_BRIDGE),
            (Ecx, 0, DEBUG_AND_POWER | FMA | MOVBE),
            (Edx, MCE | MTRR, OF_A_MACHINE),
        ],
    ),
    Leaf(
        0x7,
        0,
        true,
        &[
            (Ebx, 0, AFTER_HASWELL | BMI1 | AVX2 | BMI2 | INVPCID),
            (Ecx, 0, OF_SKYLAKE),
            (Edx, 0, AVX512_4VNNIW | AVX512_4FMAPS),
        ],
    ),
    STATE_COMPONENTS,
    XSAVE_INSTRUCTIONS,
    Leaf(0x8000_0001, 0, false, &[(Ecx, 0, LZCNT | PREFETCHW), (Edx, 0, PDPE1GB)]),
];

/// The changes that a static template makes. Empty for `None`, and for `V1N1`, which no x86_64 host
/// has.
pub fn static_template(template: CpuTemplate) -> CpuConfig {
    let (leaves, extended): (&[Leaf], &[Leaf]) = match template {
        CpuTemplate::C3 => (&C3_LEAVES, &[]),
        CpuTemplate::T2 | CpuTemplate::T2S => (&T2_LEAVES, &T2_EXTENDED),
        CpuTemplate::T2CL => (&T2_LEAVES, &T2CL_EXTENDED),
        CpuTemplate::T2A => (&T2_LEAVES, &T2A_EXTENDED),
        CpuTemplate::V1N1 | CpuTemplate::None => (&[], &[]),
    };
    let mitigations = match template {
        CpuTemplate::T2S => Some(Bitmap::exactly(MITIGATIONS_OF_T2S)),
        CpuTemplate::T2CL => Some(Bitmap::new(!MITIGATIONS_FOR_T2CL, 0)),
        _ => None,
    };
    CpuConfig {
        kvm_capabilities: Vec::new(),
        cpuid_modifiers: leaves.iter().chain(extended).map(modifier).collect(),
        msr_modifiers: mitigations
            .map(|bitmap| MsrModifier { addr: IA32_ARCH_CAPABILITIES, bitmap })
            .into_iter()
            .collect(),
    }
}

fn modifier(&Leaf(leaf, subleaf, indexed, changes): &Leaf) -> CpuidModifier {
    let change = |&(register, set, cleared): &Change| RegisterModifier {
        register,
        bitmap: Bitmap::new((set | cleared).into(), set.into()),
    };
    CpuidModifier { leaf, subleaf, flags: indexed.into(), modifiers: changes.iter().map(change).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bitmaps of a template, as published for Firecracker, in order.
    fn bitmaps(template: CpuTemplate) -> Vec<String> {
        let config = static_template(template);
        let registers = config.cpuid_modifiers.iter().flat_map(|leaf| {
            leaf.modifiers.iter().map(move |change| {
                let name = change.register.name();
                format!("{:x}.{:x} {} {name} {}", leaf.leaf, leaf.subleaf, leaf.flags, change.bitmap)
            })
        });
        let msrs = config.msr_modifiers.iter().map(|msr| format!("{:x} {}", msr.addr, msr.bitmap));
        registers.chain(msrs).collect()
    }

    const T2_START: [&str; 8] = [
        "1.0 0 eax 0bxxxx000000000011xx00011011110010",
        "1.0 0 ecx 0bxxxxxxxxxxxxx0xx00xx00x0000000xx",
        "1.0 0 edx 0b000x0xxxx00xx0xxxxx1xxxx1xxxxxxx",
        "7.0 1 ebx 0b00000000000x000000x00x1xxxx0x0xx",
        "7.0 1 ecx 0bx0xxxxxxx0xxxxx0x0x00000x0x0000x",
        "7.0 1 edx 0bxxxxxxxxxxxxxxxxxxxxxxx0xxx000xx",
        "d.0 1 eax 0bxxxxxxxxxxxxxxxxxxxxxx0x00000xxx",
        "d.1 1 eax 0bxxxxxxxxxxxxxxxxxxxxxxxxxxxx000x",
    ];

    #[test]
    fn static_templates_have_the_published_bits() {
        fn of<'a>(rest: &[&'a str]) -> Vec<&'a str> {
            [&T2_START[..], rest].concat()
        }
        let t2 = [
            "80000001.0 0 ecx 0bxx0xxxxxxxxxxxxxxxxxxxx0xxxxxxxx",
            "80000001.0 0 edx 0bxxxxx0xxxxxxxxxxxxxxxxxxxxxxxxxx",
            "80000008.0 0 ebx 0bxxxxxxxxxxxxxxxxxxxxxx0xxxxxxxxx",
        ];
        assert_eq!(bitmaps(CpuTemplate::T2), of(&t2));
        let t2s = "10a 0b0000000000000000000000000000000000001100000010100000110001001100";
        assert_eq!(bitmaps(CpuTemplate::T2S), [&of(&t2)[..], &[t2s]].concat());
        assert_eq!(
            bitmaps(CpuTemplate::T2CL),
            of(&[
                "80000001.0 0 ecx 0bxx0xxxxxxxxxxxxxxxxxxxx000xxxxxx",
                "80000001.0 0 edx 0bxxxxx00000xxxxxxxxxxxxxxxxxxxxxx",
                "80000008.0 0 ebx 0bxxxxxxxxxxxxxxxxxxxxxx0xxxxxxxxx",
                "10a 0b00000000000000000000000000000000000xxx0x0000x0x0xxx0000xxxxxxxxx",
            ])
        );
        assert_eq!(
            bitmaps(CpuTemplate::T2A),
            of(&[
                "80000001.0 0 ecx 0bxx0xxxxxxxxxxxxxxxxxxxx000xxx0xx",
                "80000001.0 0 edx 0bxxxxx00xx0xxxxxxxxxxxxxxxxxxxxxx",
                "80000008.0 0 ebx 0bxxxxxxxxxxx111xxxxxxxx0xxxxxx1x0",
            ])
        );
        assert_eq!(
            bitmaps(CpuTemplate::C3),
            [
                "1.0 0 eax 0bxxxx000000000011xx00011011100100",
                "1.0 0 ecx 0bxxxxxxxxx0xxxxxx00x000x0xx0000xx",
                "1.0 0 edx 0b0x0x0xxxx00xx0xxxxx1xxxx1xxxxxxx",
                "7.0 1 ebx 0b000000000x0x000000x000x0xx0000xx",
                "7.0 1 ecx 0bx0xxxxxxx0xxxxx0x0xx0xxxxxx0000x",
                "7.0 1 edx 0bxxxxxxxxxxxxxxxxxxxxxxxxxxxx00xx",
                "d.0 1 eax 0bxxxxxxxxxxxxxxxxxxxxxx0x00000xxx",
                "d.1 1 eax 0bxxxxxxxxxxxxxxxxxxxxxxxxxxxx000x",
                "80000001.0 0 ecx 0bxxxxxxxxxxxxxxxxxxxxxxx0xx0xxxxx",
                "80000001.0 0 edx 0bxxxxx0xxxxxxxxxxxxxxxxxxxxxxxxxx",
            ]
        );
        assert_eq!(bitmaps(CpuTemplate::None), [] as [&str; 0]);
    }

    #[test]
    fn nested_virtualization_is_hidden_by_every_template() {
        for template in [CpuTemplate::C3, CpuTemplate::T2, CpuTemplate::T2S, CpuTemplate::T2CL] {
            let config = static_template(template);
            let ecx = &config.cpuid_modifiers[0].modifiers[1];
            assert_eq!(ecx.bitmap.apply_to(u32::MAX) & VMX, 0, "{template:?}");
        }
        let t2a = static_template(CpuTemplate::T2A);
        assert_eq!(t2a.cpuid_modifiers[4].modifiers[0].bitmap.apply_to(u32::MAX) & SVM, 0);
    }
}
