//! The device as its driver sees it.

mod control;
mod frames;
mod guest;
mod interceptors;
mod limits;
mod model;
mod restore;
mod streams;

use guest::{MAC, NetGuest, frame};
