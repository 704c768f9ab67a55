//! Tests of the device through a driver.

mod control;
mod frames;
mod guest;
mod interceptors;
mod limits;
mod model;
mod restore;
mod streams;

use guest::{MAC, NetGuest, frame};
