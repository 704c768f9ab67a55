//! A vCPU's registers: CPUID, model-specific registers, boot registers; saved and restored.
//!
//! | module | what it is about |
//! |---|---|
//! | `cpuid`, `topology` | what CPUID shows to a guest |
//! | `compatibility` | whether this host's CPU has what a saved guest uses |
//! | `registers` | the registers at a kernel's entry |
//! | `msrs` | model-specific registers |
//! | `state` | all state of a vCPU |
//! | `tsc` | time stamp counters, restored together |
//! | `xsave` | the extended state |

mod compatibility;
mod cpuid;
mod msrs;
pub(crate) mod registers;
mod state;
mod topology;
mod tsc;
mod xsave;

pub(crate) use compatibility::missing_features;
pub(crate) use cpuid::Cpuid;
pub(crate) use msrs::set_boot_msrs;
pub(crate) use state::{StateFormat, VcpuState};
pub(crate) use topology::Topology;
pub(crate) use tsc::restore_counters;
