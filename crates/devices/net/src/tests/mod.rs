//! The device as its driver sees it.

mod control;
mod detours;
mod frames;
mod guest;
mod limits;
mod model;
mod restore;
mod streams;

use guest::{MAC, NetGuest, frame};
