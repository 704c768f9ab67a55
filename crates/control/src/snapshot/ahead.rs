//! Filling a restored guest's memory in ahead of it (`"prefetch": true`, an extension).
//!
//! The first restore of a memory file records which pages the guest comes to in its first second, in `MEMORY.working-set` beside it; later ones
//! read and map these in that order while the guest runs already. Neither is needed for a guest to run, so what goes wrong here goes to
//! the log.

use std::path::Path;

use memory::GuestRam;
use memory::image::ImageInfo;
use memory::working_set::{Prefetch, PrefetchOptions, RecordOptions, Recorder, WorkingSet, WorkingSetError};

use crate::CommandError;

/// What goes on beside a guest that was restored. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Ahead {
    _prefetch: Option<Prefetch>,
}

impl Ahead {
    /// Begins, before the guest runs: fills in what was recorded for the image at `path`, or records.
    pub(super) fn begin(ram: &GuestRam, path: &Path, image: &ImageInfo) -> Result<Self, CommandError> {
        let set_path = WorkingSet::path_for(path);
        if set_path.exists() {
            match WorkingSet::load(&set_path, image) {
                Ok(set) => {
                    log::info!("{} pages are filled in ahead of the guest", set.pages());
                    let prefetch = Prefetch::start(ram, set, PrefetchOptions::default());
                    return Ok(Ahead { _prefetch: Some(prefetch.map_err(CommandError::new)?) });
                }
                // The image was written anew: so is its working set.
                Err(WorkingSetError::OtherImage { .. }) => {}
                Err(error) => log::warn!("the working set is recorded anew: {error}"),
            }
        }
        let options = RecordOptions::default();
        let recorder = Recorder::start(ram, image.id, options).map_err(CommandError::new)?;
        let save = move || {
            std::thread::sleep(options.duration);
            let saved = recorder.finish().and_then(|set| {
                set.save(&set_path)?;
                Ok(set.pages())
            });
            match saved {
                Ok(pages) => log::info!("the working set {} is recorded: {pages} pages", set_path.display()),
                Err(error) => log::warn!("the working set {} is not recorded: {error}", set_path.display()),
            }
        };
        let thread = std::thread::Builder::new().name("working_set".to_owned()).spawn(save);
        thread
            .map_err(|e| CommandError::new(format_args!("cannot start a thread for the working set: {e}")))?;
        Ok(Ahead { _prefetch: None })
    }
}
