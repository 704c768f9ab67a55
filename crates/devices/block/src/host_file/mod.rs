//! The files of a disk on the host: their locks, their failed syncs, and the durability of their names.

pub(crate) mod health;
pub(crate) mod lock;
pub(crate) mod name;
