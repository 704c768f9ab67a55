//! A vCPU's registers: CPUID, model-specific registers, boot registers; saved and restored.
//!
//! | module | what it is about |
//! |---|---|
//! | `cpuid`, `topology` | what CPUID shows to a guest |
//! | `guest_cpu` | the vCPUs of a new guest: a CPU template, CPUID and the MSRs at boot |
//! | `compatibility` | whether this host's CPU has what a saved guest uses |
//! | `registers` | the registers at a kernel's entry |
//! | `msrs` | model-specific registers |
//! | `state` | all state of a vCPU |
//! | `template`, `static_templates` | CPU templates: what they change, and what the host must have |
//! | `tsc` | time stamp counters, restored together |
//! | `xsave` | the extended state |

mod compatibility;
mod cpuid;
mod guest_cpu;
mod msrs;
pub(crate) mod registers;
mod state;
mod static_templates;
mod template;
mod topology;
mod tsc;
mod xsave;

pub(crate) use compatibility::missing_features;
pub(crate) use cpuid::Cpuid;
pub(crate) use guest_cpu::GuestCpu;
pub(crate) use msrs::get_msrs;
pub(crate) use state::{CpuidLeaf, StateFormat, VcpuState};
pub use static_templates::static_template;
pub use template::TemplateError;
pub(crate) use topology::Topology;
pub(crate) use tsc::restore_counters;
