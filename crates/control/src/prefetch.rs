//! [`WorkingSetTask`]: recording and prefetching the working set of a restored guest
//! (`"prefetch": true`, an extension).
//!
//! The first restore of a memory file records which pages the guest touches in the first second
//! that it runs, in `MEMORY.working-set` beside the file. Later restores read and map these pages
//! in that order while the guest runs already. A guest needs neither in order to run, so errors go
//! to the log.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;

use memory::GuestRam;
use memory::image::ImageInfo;
use memory::working_set::{Prefetch, PrefetchOptions, RecordOptions, Recorder, WorkingSet, WorkingSetError};
use snapshot::FileId;

/// Recording or prefetching, beside a restored guest. Dropping it ends it; a recording that is not
/// complete is not kept.
#[derive(Debug)]
pub(crate) enum WorkingSetTask {
    /// Fills in the recorded pages.
    Prefetch(Prefetch),
    /// Starts a recording once the guest runs.
    ToRecord(ToRecord),
    /// Records the pages of the running guest.
    Recording(#[cfg_attr(not(test), expect(dead_code, reason = "it runs until it is dropped"))] Recording),
    /// Does nothing, for a reason that is in the log.
    Nothing,
}

/// A recording that has not started.
#[derive(Debug)]
pub(crate) struct ToRecord {
    ram: GuestRam,
    image: FileId,
    /// The file of the working set.
    path: PathBuf,
    options: RecordOptions,
}

/// A thread that saves the recording when its time is over.
#[derive(Debug)]
pub(crate) struct Recording {
    stop: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl WorkingSetTask {
    /// The pages that were filled in so far; `None` if none are to be.
    pub(crate) fn prefetched_pages(&self) -> Option<u64> {
        if let WorkingSetTask::Prefetch(prefetch) = self { Some(prefetch.pages()) } else { None }
    }

    /// Starts before the guest runs: prefetches the working set that was recorded for the image at
    /// `path`, or prepares to record one.
    pub(crate) fn start(ram: &GuestRam, path: &Path, image: &ImageInfo) -> Self {
        let set_path = WorkingSet::path_for(path);
        if set_path.exists() {
            match WorkingSet::load(&set_path, image) {
                Ok(set) => {
                    let pages = set.pages();
                    match Prefetch::start(ram, set, PrefetchOptions::default()) {
                        Ok(prefetch) => {
                            log::info!("{pages} pages are prefetched");
                            return WorkingSetTask::Prefetch(prefetch);
                        }
                        Err(error) => {
                            log::warn!("nothing is prefetched: {error}");
                            return WorkingSetTask::Nothing;
                        }
                    }
                }
                // The image was written again since, so its working set is recorded again.
                Err(WorkingSetError::OtherImage { .. }) => {}
                Err(error) => log::warn!("the working set is recorded again: {error}"),
            }
        }
        let (ram, image, options) = (ram.clone(), image.id, RecordOptions::default());
        WorkingSetTask::ToRecord(ToRecord { ram, image, path: set_path, options })
    }

    /// Called when the guest is about to run: starts the recording, at the first time.
    pub(crate) fn guest_runs(&mut self) {
        if let WorkingSetTask::ToRecord(_) = self
            && let WorkingSetTask::ToRecord(to_record) = std::mem::replace(self, WorkingSetTask::Nothing)
        {
            match to_record.start() {
                Ok(recording) => *self = WorkingSetTask::Recording(recording),
                Err(error) => log::warn!("the working set is not recorded: {error}"),
            }
        }
    }
}

impl ToRecord {
    fn start(self) -> Result<Recording, WorkingSetError> {
        let ToRecord { ram, image, path, options } = self;
        let recorder = Recorder::start(&ram, image, options)?;
        let (stop, stopped) = sync_channel(1);
        let save = move || save_when_over(recorder, &path, options, &stopped);
        let thread = sync::thread::spawn("working_set", None, save).map_err(WorkingSetError::Thread)?;
        Ok(Recording { stop: Some(stop), thread: Some(thread) })
    }
}

/// Saves the recording, unless it is stopped before its time is over.
fn save_when_over(recorder: Recorder, path: &Path, options: RecordOptions, stopped: &Receiver<()>) {
    if stopped.recv_timeout(options.duration) != Err(RecvTimeoutError::Timeout) {
        return;
    }
    let shown = path.display();
    match recorder.finish() {
        // The guest was idle. The next restore may record more.
        Ok(set) if set.pages() == 0 => {
            log::info!("the working set {shown} is not recorded: the guest touched no page");
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

    fn restored(dir: &Path, duration: Duration) -> (GuestRam, PathBuf, WorkingSetTask) {
        let path = dir.join("memory");
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        let layout = MemoryLayout::of_size(1);
        let ram = GuestRam::from_file(&layout, &path, HugePages::None, false).unwrap();
        let id = FileId::random().unwrap();
        let info = ImageInfo { layout, kind: ImageKind::Full, id, huge_pages: HugePages::None };
        let mut task = WorkingSetTask::start(&ram, &path, &info);
        let WorkingSetTask::ToRecord(to_record) = &mut task else { panic!("{task:?}") };
        to_record.options.duration = duration;
        (ram, WorkingSet::path_for(&path), task)
    }

    #[test]
    fn recording_starts_when_the_guest_first_runs() {
        let dir = tempfile::tempdir().unwrap();
        let (ram, set, mut task) = restored(dir.path(), Duration::from_millis(100));
        // Before that, the restore touches pages, for any length of time.
        ram.memory().write_obj(1u8, GuestAddress(0)).unwrap();
        assert!(matches!(task, WorkingSetTask::ToRecord(_)));
        task.guest_runs();
        task.guest_runs();
        ram.memory().write_obj(1u8, GuestAddress(200 * PAGE)).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while !set.exists() {
            assert!(Instant::now() < deadline, "nothing is saved");
            std::thread::yield_now();
        }
    }

    #[test]
    fn dropped_recording_leaves_nothing_and_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let (ram, set, mut task) = restored(dir.path(), Duration::from_hours(1));
        task.guest_runs();
        ram.memory().write_obj(1u8, GuestAddress(0)).unwrap();
        drop(task);
        assert!(!set.exists());
    }

    #[test]
    fn idle_guest_has_no_working_set() {
        let dir = tempfile::tempdir().unwrap();
        let (_ram, set, mut task) = restored(dir.path(), Duration::from_millis(10));
        task.guest_runs();
        let WorkingSetTask::Recording(mut recording) = task else { panic!("{task:?}") };
        recording.thread.take().unwrap().join().unwrap();
        assert!(!set.exists());
    }
}
