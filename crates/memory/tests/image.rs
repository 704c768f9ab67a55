//! Memory images: clones get the memory of their guest, after full snapshots, Diffs and failures.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use config::HugePages;
use proptest::prelude::*;
use vesta_memory::image::{
    ImageError, ImageInfo, ImageKind, Observer, RestoreError, WrittenImage, examine, merge, merge_in_place,
    write_diff, write_full,
};
use vesta_memory::pages::PAGE;
use vesta_memory::{GuestRam, MemoryLayout, PageSet};
use vm_memory::{Bytes, GuestAddress};

const MIB: u32 = 4;

fn ram() -> GuestRam {
    GuestRam::map(MIB, HugePages::None, true).unwrap()
}

fn put(ram: &GuestRam, page: u64, byte: u8) {
    ram.memory().write_slice(&[byte; PAGE as usize], GuestAddress(page * PAGE)).unwrap();
}

fn all(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; ram.size() as usize];
    ram.memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

fn full(ram: &GuestRam, path: &Path) -> ImageInfo {
    let WrittenImage { file, info, .. } = write_full(ram, path, &()).unwrap();
    file.commit().unwrap();
    info
}

fn diff(ram: &GuestRam, path: &Path, pages: &PageSet) -> ImageInfo {
    let WrittenImage { file, info, .. } = write_diff(ram, path, pages, &()).unwrap();
    file.commit().unwrap();
    info
}

fn restore(info: &ImageInfo, path: &Path) -> GuestRam {
    GuestRam::from_file(&info.layout, path, HugePages::None, true).unwrap()
}

fn pages(ram: &GuestRam, list: &[u64]) -> PageSet {
    let mut set = ram.empty_page_set();
    for page in list {
        set.insert(0, *page..page + 1);
    }
    set
}

/// The size of a file on disk in bytes.
fn blocks(path: &Path) -> u64 {
    path.metadata().unwrap().blocks() * 512
}

fn files(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect()
}

/// Directories on the file system of temporary files and on tmpfs, which support different
/// operations.
fn two_file_systems() -> [tempfile::TempDir; 2] {
    [tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap()]
}

#[test]
fn full_image_is_the_memory_and_sparse() {
    for dir in two_file_systems() {
        let path = dir.path().join("mem");
        let ram = ram();
        put(&ram, 0, 1);
        put(&ram, 1, 2);
        put(&ram, 2, 0);
        put(&ram, 700, 3);
        let before = ram.changed_pages().unwrap();
        let written = write_full(&ram, &path, &()).unwrap();
        assert_eq!(written.data_bytes, 3 * PAGE);
        assert_eq!(written.info.kind, ImageKind::Full);
        written.file.commit().unwrap();
        assert_eq!(ram.changed_pages().unwrap(), before, "writing touched pages");
        assert_eq!(path.metadata().unwrap().len(), ram.size());
        assert!(blocks(&path) <= 4 * PAGE, "{} bytes on disk", blocks(&path));
        assert_eq!(std::fs::read(&path).unwrap(), all(&ram));
    }
}

#[test]
fn restored_guest_reads_the_image_and_never_changes_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mem");
    let first = ram();
    put(&first, 3, 7);
    let info = full(&first, &path);
    let clones = [restore(&info, &path), restore(&info, &path)];
    assert!(clones.iter().all(|c| all(c) == all(&first)));
    put(&clones[0], 3, 8);
    assert_eq!(all(&clones[1]), all(&first));
    assert_eq!(std::fs::read(&path).unwrap(), all(&first));
}

#[test]
fn restored_regions_are_aligned_to_huge_pages() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mem");
    let layout = MemoryLayout::of_size(3 * 1024 + 5);
    File::create(&path).unwrap().set_len(layout.file_size()).unwrap();
    let ram = GuestRam::from_file(&layout, &path, HugePages::Transparent, false).unwrap();
    assert_eq!(ram.regions().len(), 2);
    assert!(ram.regions().iter().all(|r| r.host_addr % (2 << 20) == 0));
}

#[test]
fn changed_pages_of_a_restored_guest_exclude_read_pages() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mem");
    let first = ram();
    (0..100).for_each(|page| put(&first, page, 1));
    let clone = restore(&full(&first, &path), &path);
    let _ = all(&clone);
    put(&clone, 5, 2);
    clone.discard(9 * PAGE, PAGE).unwrap();
    assert_eq!(clone.changed_pages().unwrap(), pages(&clone, &[5, 9]));
}

#[test]
fn image_of_a_restored_guest_has_changed_and_unchanged_pages() {
    for here in two_file_systems() {
        for there in two_file_systems() {
            let path = here.path().join("mem");
            let first = ram();
            (10..20).for_each(|page| put(&first, page, 1));
            let clone = restore(&full(&first, &path), &path);
            put(&clone, 10, 2);
            put(&clone, 11, 0);
            put(&clone, 500, 3);
            clone.discard(12 * PAGE, 2 * PAGE).unwrap();
            std::fs::remove_file(&path).unwrap();
            let again = there.path().join("again");
            full(&clone, &again);
            assert_eq!(std::fs::read(&again).unwrap(), all(&clone));
            assert!(blocks(&again) <= 8 * PAGE, "{} bytes on disk", blocks(&again));
        }
    }
}

#[test]
fn restored_guest_can_be_saved_over_its_own_image() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mem");
    let first = ram();
    (0..10).for_each(|page| put(&first, page, 1));
    let clone = restore(&full(&first, &path), &path);
    put(&clone, 0, 0);
    put(&clone, 1, 2);
    full(&clone, &path);
    assert_eq!(std::fs::read(&path).unwrap(), all(&clone));
    put(&clone, 3, 3);
    diff(&clone, &path, &pages(&clone, &[3]));
    assert_eq!(std::fs::read(&path).unwrap(), all(&clone));
}

#[test]
fn zero_page_is_data_in_a_diff_and_a_hole_after_merge() {
    for dir in two_file_systems() {
        let (base, path) = (dir.path().join("base"), dir.path().join("diff"));
        let ram = ram();
        (0..8).for_each(|page| put(&ram, page, 1));
        full(&ram, &base);
        put(&ram, 2, 0);
        put(&ram, 600, 2);
        let info = diff(&ram, &path, &pages(&ram, &[2, 600]));
        assert_eq!(info.kind, ImageKind::Diff);
        assert_eq!(path.metadata().unwrap().len(), ram.size());
        assert_eq!(blocks(&path), 2 * PAGE);
        let merged = merge_in_place(&base, &path, &()).unwrap();
        assert_eq!((merged.data_bytes, merged.zero_bytes), (2 * PAGE, PAGE));
        assert_eq!(std::fs::read(&base).unwrap(), all(&ram));
        assert!(blocks(&base) <= 8 * PAGE, "the page of zeros did not become a hole");
    }
}

#[test]
fn diff_onto_a_base_leaves_open_readers_the_old_file() {
    for dir in two_file_systems() {
        let path = dir.path().join("mem");
        let ram = ram();
        put(&ram, 1, 1);
        put(&ram, 2, 1);
        full(&ram, &path);
        let old = File::open(&path).unwrap();
        put(&ram, 2, 2);
        diff(&ram, &path, &pages(&ram, &[2]));
        assert_eq!(std::fs::read(&path).unwrap(), all(&ram));
        let mut byte = [0];
        old.read_exact_at(&mut byte, 2 * PAGE).unwrap();
        assert_eq!(byte, [1]);
    }
}

#[test]
fn diff_onto_a_file_of_another_size_replaces_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mem");
    std::fs::write(&path, "something else").unwrap();
    let ram = ram();
    put(&ram, 2, 2);
    diff(&ram, &path, &pages(&ram, &[2]));
    assert_eq!(std::fs::read(&path).unwrap(), all(&ram));
}

#[test]
fn merge_into_a_new_file_leaves_base_and_diff_unchanged() {
    for dir in two_file_systems() {
        let [base, path, out] = ["base", "diff", "out"].map(|name| dir.path().join(name));
        let ram = ram();
        put(&ram, 1, 1);
        full(&ram, &base);
        put(&ram, 1, 2);
        diff(&ram, &path, &pages(&ram, &[1]));
        let before = (std::fs::read(&base).unwrap(), std::fs::read(&path).unwrap());
        let merged = merge(&base, &path, &out, &()).unwrap();
        assert!(merged.id.is_some());
        assert_eq!(std::fs::read(&out).unwrap(), all(&ram));
        assert_eq!((std::fs::read(&base).unwrap(), std::fs::read(&path).unwrap()), before);
    }
}

#[test]
fn images_of_different_guests_are_not_merged() {
    let dir = tempfile::tempdir().unwrap();
    let (base, path) = (dir.path().join("base"), dir.path().join("diff"));
    File::create(&base).unwrap().set_len(8192).unwrap();
    File::create(&path).unwrap().set_len(4096).unwrap();
    let error = merge_in_place(&base, &path, &()).unwrap_err().to_string();
    assert!(
        error.contains("it has 8192 bytes, ") && error.contains("has 4096: they are not of one guest"),
        "{error}"
    );
    assert!(matches!(merge_in_place(&base, &base, &()), Err(ImageError::SameFile { .. })));
    assert!(matches!(merge(&base, dir.path(), &base, &()), Err(ImageError::Read { .. })));
}

#[test]
fn short_image_error_has_both_sizes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mem");
    File::create(&path).unwrap().set_len(4096).unwrap();
    let error = GuestRam::from_file(&MemoryLayout::of_size(1), &path, HugePages::None, false).unwrap_err();
    assert!(matches!(error, RestoreError::TooShort { found: 4096, needed: 1_048_576, .. }), "{error}");
    assert!(error.to_string().ends_with("has 4096 bytes; the guest needs 1048576"), "{error}");
}

#[test]
fn fifo_and_directory_are_refused_without_blocking() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let layout = MemoryLayout::of_size(1);
    for path in [&fifo, dir.path()] {
        let error = GuestRam::from_file(&layout, path, HugePages::None, false).unwrap_err();
        assert!(matches!(error, RestoreError::NotAFile { .. }), "{error}");
    }
    let missing = GuestRam::from_file(&layout, Path::new("/no/mem"), HugePages::None, false).unwrap_err();
    assert!(missing.to_string().starts_with("memory image /no/mem: cannot read: No such file"), "{missing}");
}

struct StopAfter(u32, Mutex<Vec<(u64, u64)>>);

impl Observer for StopAfter {
    fn progress(&self, done: u64, total: u64) {
        self.1.lock().unwrap().push((done, total));
    }

    fn cancelled(&self) -> bool {
        self.1.lock().unwrap().len() as u32 >= self.0
    }
}

#[test]
fn progress_reaches_the_total_and_cancel_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mem");
    let ram = GuestRam::map(32, HugePages::None, false).unwrap();
    (0..32 * 256).for_each(|page| put(&ram, page, 1));
    let watcher = StopAfter(u32::MAX, Mutex::default());
    drop(write_full(&ram, &path, &watcher).unwrap());
    let seen = watcher.1.into_inner().unwrap();
    assert!(seen.len() >= 8 && seen.windows(2).all(|w| w[0].0 < w[1].0), "{seen:?}");
    assert_eq!(*seen.last().unwrap(), (ram.size(), ram.size()));
    let error = write_full(&ram, &path, &StopAfter(2, Mutex::default())).unwrap_err();
    assert!(matches!(error, ImageError::Cancelled { .. }), "{error}");
    assert_eq!(files(dir.path()), Vec::<PathBuf>::new());
}

/// Free pages in the pool of 2 MiB pages.
fn free_huge_pages() -> u64 {
    let info = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    info.map_or(0, |count| count.trim().parse().unwrap())
}

#[test]
fn hugetlb_memory_is_saved_and_restored_but_not_forked() {
    if free_huge_pages() < 4 {
        eprintln!("not run: it needs four free pages in the pool (/proc/sys/vm/nr_hugepages)");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mem");
    let ram = GuestRam::map(MIB, HugePages::Hugetlbfs2M, true).unwrap();
    put(&ram, 600, 1);
    assert_eq!(ram.changed_pages().unwrap().count(), 512);
    let info = full(&ram, &path);
    assert_eq!(info.huge_pages, HugePages::Hugetlbfs2M);
    assert!(blocks(&path) <= PAGE, "{} bytes on disk", blocks(&path));
    let clone = GuestRam::from_file(&info.layout, &path, HugePages::Hugetlbfs2M, false).unwrap();
    assert_eq!(clone.page_size(), 2 << 20);
    assert!(all(&clone) == all(&ram));
    assert!(clone.discard(0, PAGE).is_err(), "half a page");
    clone.discard(2 << 20, 2 << 20).unwrap();
    assert!(all(&clone).iter().all(|b| *b == 0));
    assert_eq!(ram.fork_check(), Err(vesta_memory::ForkError::HugePagePool));
}

#[test]
fn dropped_hugetlb_memory_returns_to_the_pool() {
    let pool = free_huge_pages();
    if pool < 4 {
        eprintln!("not run: it needs four free pages in the pool (/proc/sys/vm/nr_hugepages)");
        return;
    }
    // More than half of the pool, so that a second guest does not fit while the first is reserved.
    let mib = u32::try_from(pool / 2 + 1).unwrap() * 2;
    for byte in 1..4 {
        let ram = GuestRam::map(mib, HugePages::Hugetlbfs2M, false).unwrap();
        put(&ram, 0, byte);
    }
}

#[test]
fn unmerged_diff_is_refused_until_it_has_all_pages() {
    let dir = tempfile::tempdir().unwrap();
    let [base, alone, second, merged, whole] =
        ["base", "alone", "second", "merged", "whole"].map(|name| dir.path().join(name));
    let ram = ram();
    put(&ram, 3, 1);
    let info = full(&ram, &base);
    put(&ram, 5, 2);
    let refused = |path: &Path| {
        let error = GuestRam::from_file(&info.layout, path, HugePages::None, false).unwrap_err();
        assert!(matches!(&error, RestoreError::Partial { path: named } if named == path), "{error}");
        assert!(examine(path, &info).unwrap().partial);
    };
    diff(&ram, &alone, &pages(&ram, &[5]));
    refused(&alone);
    // A Diff onto an unmerged Diff is still unmerged.
    std::fs::remove_file(&alone).unwrap();
    diff(&ram, &alone, &pages(&ram, &[7]));
    diff(&ram, &alone, &pages(&ram, &[5]));
    refused(&alone);
    diff(&ram, &second, &pages(&ram, &[5]));
    merge(&alone, &second, &merged, &()).unwrap();
    refused(&merged);
    // A Diff on the base is merged, and a Diff with all pages in use needs no base.
    merge(&base, &alone, &merged, &()).unwrap();
    diff(&ram, &base, &pages(&ram, &[5]));
    diff(&ram, &whole, &pages(&ram, &[3, 5]));
    for path in [&merged, &base, &whole] {
        assert!(all(&restore(&info, path)) == all(&ram), "{}", path.display());
    }
}

#[test]
fn regions_on_both_sides_of_the_hole_are_restored() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mem");
    let ram = GuestRam::map(3 * 1024 + 2, HugePages::None, false).unwrap();
    let (low, high) = (GuestAddress((3 << 30) - 1), GuestAddress((4 << 30) + 1));
    ram.memory().write_obj(1u8, low).unwrap();
    ram.memory().write_obj(2u8, high).unwrap();
    let info = full(&ram, &path);
    let mut byte = [0];
    File::open(&path).unwrap().read_exact_at(&mut byte, (3 << 30) + 1).unwrap();
    assert_eq!(byte, [2]);
    let clone = restore(&info, &path);
    assert_eq!(clone.memory().read_obj::<u8>(low).unwrap(), 1);
    assert_eq!(clone.memory().read_obj::<u8>(high).unwrap(), 2);
}

/// A file system of 1 MiB, for as long as the value lives. Needs root.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("tmpfs", dir.path(), "tmpfs", flags, c"size=1m").expect("root can mount");
        SmallDisk(dir)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::empty()).unwrap();
    }
}

#[test]
fn full_disk_leaves_the_old_image() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: mounting a small file system needs root");
        return;
    }
    let disk = SmallDisk::mount();
    let path = disk.0.path().join("mem");
    std::fs::write(&path, "old").unwrap();
    let ram = ram();
    (0..400).for_each(|page| put(&ram, page, 1));
    for result in [write_full(&ram, &path, &()), write_diff(&ram, &path, &ram.all_pages(), &())] {
        let error = result.unwrap_err();
        assert!(matches!(error, ImageError::Write { size: 4_194_304, .. }), "{error}");
        let wanted = format!(
            "memory image {}: cannot write at offset 0 of 4194304 bytes: No space left",
            path.display()
        );
        assert!(error.to_string().starts_with(&wanted), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(files(disk.0.path()), std::slice::from_ref(&path));
    }
}

/// Writes an image in a child process, as a live snapshot does, and waits for it. `meanwhile` runs
/// in the parent first.
fn full_in_child(ram: &GuestRam, path: &Path, meanwhile: impl FnOnce()) {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    // SAFETY: the child writes the image and exits. It takes no lock that another thread may hold.
    let child = unsafe { libc::fork() };
    if child == 0 {
        drop(write);
        // Wait until the parent is done.
        let _ = rustix::io::read(&read, &mut [0; 1]);
        let done = write_full(ram, path, &()).is_ok_and(|image| image.file.commit().is_ok());
        // SAFETY: exits the child without running the parent's exit handlers.
        unsafe { libc::_exit(i32::from(!done)) };
    }
    assert!(child > 0);
    meanwhile();
    drop(write);
    let mut status = 0;
    // SAFETY: waits for a child of this process.
    let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!((waited, status), (child, 0));
}

#[test]
fn image_written_by_a_fork_is_the_memory_at_the_fork() {
    let dir = tempfile::tempdir().unwrap();
    let (base, path) = (dir.path().join("base"), dir.path().join("mem"));
    let new = ram();
    (0..300).for_each(|page| put(&new, page, 1));
    let clone = restore(&full(&new, &base), &base);
    put(&clone, 7, 2);
    clone.discard(9 * PAGE, PAGE).unwrap();
    for ram in [new, clone] {
        ram.fork_check().unwrap();
        let before = all(&ram);
        full_in_child(&ram, &path, || (0..400).for_each(|page| put(&ram, page, 9)));
        assert!(std::fs::read(&path).unwrap() == before, "the parent's later writes are in the image");
    }
}

/// One operation of a history.
#[derive(Debug, Clone)]
enum Act {
    Write(u64, u64, u8),
    Discard(u64, u64),
    Full,
    Diff,
    UntrackedDiff,
    Restore,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let run = || (0..256u64, 1..20u64);
    let act = prop_oneof![
        6 => (run(), 0..3u8).prop_map(|((page, len), byte)| Act::Write(page, len.min(256 - page), byte)),
        2 => run().prop_map(|(page, len)| Act::Discard(page, len.min(256 - page))),
        1 => Just(Act::Full),
        2 => Just(Act::Diff),
        1 => Just(Act::UntrackedDiff),
        2 => Just(Act::Restore),
    ];
    proptest::collection::vec(act, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    /// A guest of 1 MiB and a model of its memory. After any history its image, with the Diffs
    /// merged, is the model.
    #[test]
    fn any_history_of_snapshots_and_restores_keeps_memory(acts in acts(), on_tmpfs: bool) {
        let dir = two_file_systems().into_iter().nth(usize::from(on_tmpfs)).unwrap();
        let [image, part] = ["image", "part"].map(|name| dir.path().join(name));
        let mut ram = GuestRam::map(1, HugePages::None, true).unwrap();
        let mut model = vec![0u8; 1 << 20];
        let mut info = full(&ram, &image);
        ram.reset_monitor_dirty_pages();
        for act in acts {
            match act {
                Act::Write(page, len, byte) => {
                    (page..page + len).for_each(|page| put(&ram, page, byte));
                    model[(page * PAGE) as usize..((page + len) * PAGE) as usize].fill(byte);
                }
                Act::Discard(page, len) => {
                    ram.discard(page * PAGE, len * PAGE).unwrap();
                    model[(page * PAGE) as usize..((page + len) * PAGE) as usize].fill(0);
                }
                Act::Full => {
                    ram.reset_monitor_dirty_pages();
                    info = full(&ram, &image);
                }
                // Onto the image itself, or to a file of its own that is then merged.
                Act::Diff => {
                    let dirty = ram.take_monitor_dirty_pages().unwrap();
                    if dirty.count().is_multiple_of(2) {
                        diff(&ram, &image, &dirty);
                    } else {
                        let _ = std::fs::remove_file(&part);
                        diff(&ram, &part, &dirty);
                        merge(&image, &part, &image, &()).unwrap();
                    }
                }
                Act::UntrackedDiff => {
                    ram.reset_monitor_dirty_pages();
                    diff(&ram, &image, &ram.changed_pages().unwrap());
                }
                Act::Restore => {
                    let dirty = ram.take_monitor_dirty_pages().unwrap();
                    diff(&ram, &image, &dirty);
                    ram = restore(&info, &image);
                }
            }
            prop_assert!(all(&ram) == model, "the guest's memory");
        }
        diff(&ram, &image, &ram.take_monitor_dirty_pages().unwrap());
        prop_assert!(std::fs::read(&image).unwrap() == model, "the image");
        prop_assert!(all(&restore(&info, &image)) == model, "a restored guest");
    }
}
