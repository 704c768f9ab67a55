//! The network device (virtio 1.3, section 5.1).

pub mod detour;

pub use detour::Detour;
