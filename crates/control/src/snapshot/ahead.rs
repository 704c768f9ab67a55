//! Filling a restored guest's memory in ahead of it (`"prefetch": true`, an extension).
//!
//! The first restore of a memory file records which pages the guest comes to in the first second that it runs, in `MEMORY.working-set` beside it; later
//! ones read and map these in that order while the guest runs already. Neither is needed for a guest to run, so what goes wrong here goes to
//! the log.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;

use memory::GuestRam;
use memory::image::ImageInfo;
use memory::working_set::{Prefetch, PrefetchOptions, RecordOptions, Recorder, WorkingSet, WorkingSetError};
use snapshot::FileId;

/// What goes on beside a guest that was restored. Dropping it ends it; of a recording that was not over nothing is kept.
#[derive(Debug)]
pub(crate) enum Ahead {
    /// What was recorded is filled in.
    Prefetch(#[expect(dead_code, reason = "it goes on for as long as it is kept")] Prefetch),
    /// The guest has not run yet: there is nothing to record.
    ToRecord(ToRecord),
    /// It runs, and is watched.
    Recording(
        #[cfg_attr(not(test), expect(dead_code, reason = "it goes on for as long as it is kept"))] Recording,
    ),
    /// Nothing, for a reason that is in the log.
    Nothing,
}

/// A recording to come.
#[derive(Debug)]
pub(crate) struct ToRecord {
    ram: GuestRam,
    image: FileId,
    /// Where it will be kept.
    path: PathBuf,
    options: RecordOptions,
}

/// A thread that keeps the recording once it is over.
#[derive(Debug)]
pub(crate) struct Recording {
    stop: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Ahead {
    /// Begins, before the guest runs: fills in what was recorded for the image at `path`, or gets ready to record.
    pub(super) fn begin(ram: &GuestRam, path: &Path, image: &ImageInfo) -> Self {
        let set_path = WorkingSet::path_for(path);
        if set_path.exists() {
            match WorkingSet::load(&set_path, image) {
                Ok(set) => {
                    let pages = set.pages();
                    match Prefetch::start(ram, set, PrefetchOptions::default()) {
                        Ok(prefetch) => {
                            log::info!("{pages} pages are filled in ahead of the guest");
                            return Ahead::Prefetch(prefetch);
                        }
                        Err(error) => {
                            log::warn!("nothing is filled in ahead of the guest: {error}");
                            return Ahead::Nothing;
                        }
                    }
                }
                // The image was written anew: so is its working set.
                Err(WorkingSetError::OtherImage { .. }) => {}
                Err(error) => log::warn!("the working set is recorded anew: {error}"),
            }
        }
        let (ram, image, options) = (ram.clone(), image.id, RecordOptions::default());
        Ahead::ToRecord(ToRecord { ram, image, path: set_path, options })
    }

    /// The guest is about to run, perhaps for the first time.
    pub(crate) fn guest_runs(&mut self) {
        if let Ahead::ToRecord(_) = self
            && let Ahead::ToRecord(to_record) = std::mem::replace(self, Ahead::Nothing)
        {
            match to_record.begin() {
                Ok(recording) => *self = Ahead::Recording(recording),
                Err(error) => log::warn!("the working set is not recorded: {error}"),
            }
        }
    }
}

impl ToRecord {
    fn begin(self) -> Result<Recording, WorkingSetError> {
        let ToRecord { ram, image, path, options } = self;
        let recorder = Recorder::start(&ram, image, options)?;
        let (stop, stopped) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("working_set".to_owned())
            .spawn(move || keep(recorder, &path, options, &stopped))
            .map_err(WorkingSetError::Thread)?;
        Ok(Recording { stop: Some(stop), thread: Some(thread) })
    }
}

/// Keeps what was recorded, unless it is stopped before the time is over.
fn keep(recorder: Recorder, path: &Path, options: RecordOptions, stopped: &Receiver<()>) {
    if stopped.recv_timeout(options.duration) != Err(RecvTimeoutError::Timeout) {
        return;
    }
    let shown = path.display();
    match recorder.finish() {
        // A guest that stood still: the next restore may tell more.
        Ok(set) if set.pages() == 0 => {
            log::info!("the working set {shown} is not recorded: the guest came to no page");
        }
        Ok(set) => match set.save(path) {
            Ok(()) => log::info!("the working set {shown} is recorded: {} pages", set.pages()),
            Err(error) => log::warn!("the working set {shown} is not recorded: {error}"),
        },
        Err(error) => log::warn!("the working set {shown} is not recorded: {error}"),
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let joined = thread.join();
            debug_assert!(joined.is_ok(), "nothing in it panics");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use config::HugePages;
    use memory::MemoryLayout;
    use memory::image::ImageKind;
    use memory::pages::PAGE;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn restored(dir: &Path, duration: Duration) -> (GuestRam, PathBuf, Ahead) {
        let path = dir.join("memory");
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        let layout = MemoryLayout::of_size(1);
        let ram = GuestRam::from_file(&layout, &path, HugePages::None, false).unwrap();
        let id = FileId::random().unwrap();
        let info = ImageInfo { layout, kind: ImageKind::Full, id, huge_pages: HugePages::None };
        let mut ahead = Ahead::begin(&ram, &path, &info);
        let Ahead::ToRecord(to_record) = &mut ahead else { panic!("{ahead:?}") };
        to_record.options.duration = duration;
        (ram, WorkingSet::path_for(&path), ahead)
    }

    #[test]
    fn a_guest_is_watched_from_when_it_first_runs() {
        let dir = tempfile::tempdir().unwrap();
        let (ram, set, mut ahead) = restored(dir.path(), Duration::from_millis(100));
        // Before that pages are touched by whoever restores it, for as long as it likes.
        ram.memory().write_obj(1u8, GuestAddress(0)).unwrap();
        assert!(matches!(ahead, Ahead::ToRecord(_)));
        ahead.guest_runs();
        ahead.guest_runs();
        ram.memory().write_obj(1u8, GuestAddress(200 * PAGE)).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while !set.exists() {
            assert!(Instant::now() < deadline, "nothing is kept");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_recording_that_is_dropped_leaves_nothing_and_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let (ram, set, mut ahead) = restored(dir.path(), Duration::from_hours(1));
        ahead.guest_runs();
        ram.memory().write_obj(1u8, GuestAddress(0)).unwrap();
        drop(ahead);
        assert!(!set.exists());
    }

    #[test]
    fn a_guest_that_came_to_no_page_has_no_working_set() {
        let dir = tempfile::tempdir().unwrap();
        let (_ram, set, mut ahead) = restored(dir.path(), Duration::from_millis(10));
        ahead.guest_runs();
        let Ahead::Recording(mut recording) = ahead else { panic!("{ahead:?}") };
        recording.thread.take().unwrap().join().unwrap();
        assert!(!set.exists());
    }
}
