//! The asynchronous engine: one `io_uring`.
//!
//! Files are registered once, so that operations need no reference counting. Restrictions let the
//! ring do only the few operations that disks need, and only on registered files: a ring that is
//! misused opens nothing.
//!
//! The worker waits for the ring's own descriptor, which is readable while there are completions.
//! Operations that complete inside `submit` (from the page cache) are reaped without another system
//! call, and there is no event descriptor to read.
//!
//! Some transfers would be slower in the ring. Where the kernel cannot know that an operation will
//! not block, it hands it to a kernel thread, and that costs more than the operation. The engine
//! carries these out itself, with a plain system call, if that cannot hurt: files in memory always,
//! other writes if the worker may block ([`Blocking::Allowed`]). A write that took longer than
//! [`SLOW_WRITE`] did wait for the disk. Then the next [`FORCED_RING_WRITES`] go through the ring,
//! so that reads do not wait behind them.
//!
//! # Bounds
//!
//! At most [`ENTRIES`] operations are in the kernel, half the size of the completion queue, so no
//! completion is dropped. Further transfers wait in the engine.
//!
//! # Where unsafe is
//!
//! This leaf module passes guest memory to the kernel: the addresses in a submission must stay
//! valid until its completion. The engine owns each transfer for exactly that long.
#![expect(unsafe_code, reason = "a submission carries the addresses of guest memory")]

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::squeue::Flags;
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, Probe, opcode, register::Restriction, squeue};

use super::Engine;
use super::blocking::{BYTES_PER_SUBMIT, carry_out};
use super::transfer::{Blocking, Done, Op, Progress, Transfer};
use crate::creator_pid::CreatorPid;
use crate::slab::Slab;

/// Most operations in the kernel.
pub(crate) const ENTRIES: u32 = 128;

/// The operations that the engine uses.
const OPCODES: [u8; 7] = [
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::SyncFileRange::CODE,
    opcode::Fallocate::CODE,
];

/// `IORING_UNREGISTER_FILES`: the only registration allowed once the ring is enabled.
const UNREGISTER_FILES: u8 = 3;

/// A write that takes longer has waited for the disk, or for a CPU.
const SLOW_WRITE: Duration = Duration::from_millis(10);

/// Number of writes that go through the ring after a slow one.
const FORCED_RING_WRITES: u32 = 64;

/// Most repetitions of `submit` when the kernel has no memory; after that, the rest waits.
const SUBMIT_ATTEMPTS: u32 = 100;

/// Why `io_uring` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UringError {
    /// The kernel has no `io_uring`, or it is disabled or blocked by a seccomp filter.
    #[error("io_uring is not available: {0}")]
    Unavailable(#[source] io::Error),
    /// The kernel lacks an operation.
    #[error("io_uring: the kernel lacks operation {0}")]
    MissingOperation(u8),
    /// A step of the setup failed.
    #[error("io_uring: cannot {step}: {source}")]
    Setup {
        /// The step.
        step: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// An `io_uring` and its transfers.
pub(crate) struct Uring<T: Send> {
    /// Not dropped in a fork; see `Drop`.
    ring: ManuallyDrop<IoUring>,
    /// Transfers in the kernel or waiting for a place in the ring, by `user_data`.
    slots: Slab<Transfer<T>>,
    /// Slots that wait for a place in the ring, in order.
    waiting: VecDeque<u32>,
    /// Transfers that this thread carries out itself, in order.
    local: VecDeque<Transfer<T>>,
    /// Transfers of this thread that are complete.
    local_done: Vec<Done<T>>,
    /// By file: whether it is in memory, so that this thread carries out its reads and writes.
    in_memory: Vec<bool>,
    blocking: Blocking,
    /// Writes that still go through the ring although this thread may block.
    forced_ring_writes: u32,
    /// Operations pushed into the ring and not yet reaped.
    in_ring: u32,
    /// Operations pushed into the ring since the last successful `submit`.
    unsubmitted: u32,
    in_flight: usize,
    creator: CreatorPid,
    /// Kept open while the kernel may use them.
    files: ManuallyDrop<Vec<Arc<File>>>,
}

impl<T: Send> std::fmt::Debug for Uring<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}

impl<T: Send> Uring<T> {
    /// Sets up a ring for `files`; the file of a transfer is an index into them. Without files it
    /// only checks whether `io_uring` can be used.
    pub(crate) fn new(files: Vec<Arc<File>>, blocking: Blocking) -> Result<Self, UringError> {
        let ring = build()?;
        let submitter = ring.submitter();
        let step = |step| move |source| UringError::Setup { step, source };

        let mut probe = Probe::new();
        submitter.register_probe(&mut probe).map_err(step("probe"))?;
        if let Some(code) = OPCODES.into_iter().find(|&code| !probe.is_supported(code)) {
            return Err(UringError::MissingOperation(code));
        }
        let fds: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        if !fds.is_empty() {
            submitter.register_files(&fds).map_err(step("register files"))?;
        }
        let mut restrictions: Vec<Restriction> = OPCODES.map(Restriction::sqe_op).into();
        restrictions.push(Restriction::sqe_flags_allowed(Flags::FIXED_FILE.bits()));
        restrictions.push(Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()));
        restrictions.push(Restriction::register_op(UNREGISTER_FILES));
        submitter.register_restrictions(&mut restrictions).map_err(step("restrict"))?;
        submitter.register_enable_rings().map_err(step("enable"))?;

        let in_memory = files.iter().map(|file| is_in_memory(file)).collect();
        Ok(Uring {
            ring: ManuallyDrop::new(ring),
            slots: Slab::default(),
            waiting: VecDeque::new(),
            local: VecDeque::new(),
            local_done: Vec::new(),
            in_memory,
            blocking,
            forced_ring_writes: 0,
            in_ring: 0,
            unsubmitted: 0,
            in_flight: 0,
            creator: CreatorPid::current(),
            files: ManuallyDrop::new(files),
        })
    }

    /// This ring, made to take reads and writes of files in memory too.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn with_all_in_ring(mut self) -> Self {
        self.in_memory.fill(false);
        self
    }

    /// Whether this thread carries `transfer` out.
    fn runs_locally(&mut self, transfer: &Transfer<T>) -> bool {
        let in_memory = self.in_memory[usize::from(transfer.file())];
        match transfer.op() {
            Op::Read => in_memory,
            Op::Write if in_memory => true,
            Op::Write if self.blocking == Blocking::Never => false,
            Op::Write if self.forced_ring_writes > 0 => {
                self.forced_ring_writes -= 1;
                false
            }
            Op::Write => true,
            Op::Sync | Op::WriteBack | Op::PunchHole | Op::ZeroRange => false,
        }
    }

    /// Puts the operation of `slot` into the ring, or into the queue for it.
    fn start(&mut self, slot: u32) {
        if !self.waiting.is_empty() || self.in_ring == ENTRIES {
            self.waiting.push_back(slot);
            return;
        }
        self.enter_ring(slot);
    }

    /// Puts the operation of `slot` into the ring, which is not full.
    fn enter_ring(&mut self, slot: u32) {
        let transfer = self.slots.get(slot).expect("a slot in use holds a transfer");
        let entry = entry(transfer).flags(Flags::FIXED_FILE).user_data(slot.into());
        // SAFETY: the iovecs of the entry, and the memory they point to, stay valid until its
        // completion. `slots` owns the transfer until then and neither changes nor drops it. Moving
        // the transfer does not move the iovecs, which are on the heap. The kernel writes only to
        // iovecs that are guest RAM (invariant of `Transfer`).
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("at most ENTRIES operations are in the ring");
        self.in_ring += 1;
        self.unsubmitted += 1;
    }

    /// Submits the ring to the kernel and waits for `want` completions.
    fn enter(&mut self, want: usize) {
        if self.unsubmitted == 0 && want == 0 {
            return;
        }
        for _ in 0..SUBMIT_ATTEMPTS {
            match self.ring.submit_and_wait(want) {
                Ok(taken) => {
                    self.unsubmitted = self.unsubmitted.saturating_sub(taken as u32);
                    if self.unsubmitted == 0 {
                        return;
                    }
                }
                // The kernel is out of memory for now, or a signal came.
                Err(_) => std::thread::yield_now(),
            }
        }
    }

    /// Takes the completions out of the ring.
    fn collect(&mut self, done: &mut Vec<Done<T>>) {
        let Uring { ring, slots, waiting, in_ring, in_flight, .. } = self;
        for completion in ring.completion() {
            *in_ring -= 1;
            let slot = completion.user_data() as u32;
            let transfer = slots.get_mut(slot).expect("a completion is for a slot in use");
            match transfer.advance(completion.result()) {
                Progress::Finished(result) => {
                    let transfer = slots.remove(slot).expect("just seen");
                    done.push(transfer.finish(result));
                    *in_flight -= 1;
                }
                Progress::Retry => waiting.push_back(slot),
            }
        }
    }
}

impl<T: Send> Engine<T> for Uring<T> {
    fn push(&mut self, transfer: Transfer<T>) {
        self.in_flight += 1;
        if self.runs_locally(&transfer) {
            self.local.push_back(transfer);
            return;
        }
        let slot = self.slots.add(transfer);
        self.start(slot);
    }

    fn submit(&mut self) {
        // The ring first: the kernel works on it meanwhile.
        self.enter(0);
        if self.local.is_empty() {
            return;
        }
        let mut moved = 0;
        let mut start = Instant::now();
        while moved < BYTES_PER_SUBMIT
            && let Some(mut transfer) = self.local.pop_front()
        {
            moved += transfer.remaining().max(4096);
            let result = carry_out(&mut transfer, &self.files);
            self.local_done.push(transfer.finish(result));
            let now = Instant::now();
            if now - start > SLOW_WRITE {
                self.forced_ring_writes = FORCED_RING_WRITES;
            }
            start = now;
        }
    }

    fn reap(&mut self, done: &mut Vec<Done<T>>) {
        self.in_flight -= self.local_done.len();
        done.append(&mut self.local_done);
        loop {
            self.collect(done);
            while self.in_ring < ENTRIES
                && let Some(slot) = self.waiting.pop_front()
            {
                self.enter_ring(slot);
            }
            if self.unsubmitted == 0 {
                return;
            }
            // The rest of short transfers, those that waited for a place, and those the kernel did
            // not take.
            self.enter(0);
            if self.unsubmitted > 0 {
                return;
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn has_more(&self) -> bool {
        self.unsubmitted > 0 || !self.local.is_empty() || !self.local_done.is_empty()
    }

    fn wait(&mut self) {
        if self.in_ring > 0 && self.local.is_empty() && self.local_done.is_empty() {
            self.enter(1);
        }
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the ring owns the descriptor and lives at least as long as the borrow of `self`.
        Some(unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) })
    }
}

impl<T: Send> Drop for Uring<T> {
    /// Waits for the operations in the kernel, because they use the iovecs. Then unregisters the
    /// files: the kernel frees a ring some time later, and until then a block device would count as
    /// in use.
    ///
    /// In a fork the ring is still the parent's, and its memory is not mapped. Other mappings and
    /// descriptors may have its addresses and numbers, so nothing is unmapped and nothing is
    /// closed.
    fn drop(&mut self) {
        if !self.creator.is_current() {
            return;
        }
        let mut done = Vec::new();
        while self.in_flight > 0 {
            self.submit();
            self.wait();
            self.reap(&mut done);
            done.clear();
        }
        let _ = self.ring.submitter().unregister_files();
        // SAFETY: it is dropped once, here, and not used afterwards: `self` is gone when this
        // returns.
        unsafe { ManuallyDrop::drop(&mut self.ring) };
        // SAFETY: as above.
        unsafe { ManuallyDrop::drop(&mut self.files) };
    }
}

/// Whether the contents of `file` are only in memory, so that a read or write is just a copy.
///
/// The kernel's `io_uring` does not know that, and hands each of them to a kernel thread. A block
/// device does not count: its node is in a file system in memory, `/dev`, which says nothing about
/// the device.
fn is_in_memory(file: &File) -> bool {
    const TMPFS: u64 = 0x0102_1994;
    const RAMFS: u64 = 0x8584_58f6;
    file.metadata().is_ok_and(|metadata| metadata.is_file())
        && rustix::fs::fstatfs(file).is_ok_and(|fs| [TMPFS, RAMFS].contains(&(fs.f_type.cast_unsigned())))
}

/// Builds a ring that is not enabled yet.
fn build() -> Result<IoUring, UringError> {
    // A fork does not inherit the mapping of the ring: it could submit to it. `coop_taskrun` spares
    // inter-processor interrupts; kernels before 5.19 do not know it.
    let with_coop = IoUring::builder().dontfork().setup_r_disabled().setup_coop_taskrun().build(ENTRIES);
    with_coop
        .or_else(|_| IoUring::builder().dontfork().setup_r_disabled().build(ENTRIES))
        .map_err(UringError::Unavailable)
}

/// The submission for the rest of `transfer`.
fn entry<T>(transfer: &Transfer<T>) -> squeue::Entry {
    let file = Fixed(transfer.file().into());
    let offset = transfer.offset();
    match (transfer.op(), transfer.iov()) {
        (Op::Read, [one]) => {
            let len = u32::try_from(one.len()).unwrap_or(MAX_LEN);
            opcode::Read::new(file, std::ptr::with_exposed_provenance_mut(one.addr()), len)
                .offset(offset)
                .build()
        }
        (Op::Write, [one]) => {
            let len = u32::try_from(one.len()).unwrap_or(MAX_LEN);
            opcode::Write::new(file, std::ptr::with_exposed_provenance(one.addr()), len)
                .offset(offset)
                .build()
        }
        (Op::Read, many) => {
            opcode::Readv::new(file, many.as_ptr().cast(), many.len() as u32).offset(offset).build()
        }
        (Op::Write, many) => {
            opcode::Writev::new(file, many.as_ptr().cast(), many.len() as u32).offset(offset).build()
        }
        (Op::Sync, _) => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
        (Op::WriteBack, _) => opcode::SyncFileRange::new(file, 0).flags(libc::SYNC_FILE_RANGE_WRITE).build(),
        (Op::PunchHole, _) => fallocate(file, transfer, libc::FALLOC_FL_PUNCH_HOLE),
        (Op::ZeroRange, _) => fallocate(file, transfer, libc::FALLOC_FL_ZERO_RANGE),
    }
}

/// Longest single read or write; the kernel stops at 2^31 - 4096 anyway.
const MAX_LEN: u32 = 1 << 30;

fn fallocate<T>(file: Fixed, transfer: &Transfer<T>, mode: i32) -> squeue::Entry {
    opcode::Fallocate::new(file, transfer.remaining())
        .offset(transfer.offset())
        .mode(mode | libc::FALLOC_FL_KEEP_SIZE)
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_node_is_not_a_file_in_memory() {
        let node = File::open("/dev/null").unwrap();
        // `/dev` is a file system in memory; a device in it is not in memory.
        assert!(!is_in_memory(&node));
        let memory = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert!(is_in_memory(&memory.into()));
    }

    /// Address and length in bytes of the first mapping of a ring in this process.
    fn mapping_of_a_ring() -> (usize, usize) {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let line =
            maps.lines().find(|line| line.ends_with("anon_inode:[io_uring]")).expect("a ring is mapped");
        let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let [start, end] = [start, end].map(|addr| usize::from_str_radix(addr, 16).unwrap());
        (start, end - start)
    }

    /// Runs `work` in a fork of this process and returns its result.
    fn in_fork(work: impl FnOnce() -> bool) -> bool {
        // SAFETY: the child runs `work` and exits without destructors. It takes no lock of this
        // process but the allocator's, which `fork` makes usable.
        match unsafe { libc::fork() } {
            0 => {
                let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or(false);
                // SAFETY: no precondition.
                unsafe { libc::_exit(i32::from(!done)) }
            }
            child => {
                assert!(child > 0, "{}", io::Error::last_os_error());
                let mut status = 0;
                // SAFETY: `status` is valid for the write.
                let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
                assert_eq!(waited, child);
                libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
            }
        }
    }

    /// Other tests of this process have rings too, so this one has a process of its own.
    #[test]
    fn ring_dropped_in_a_fork_unmaps_and_closes_nothing() {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "engine::uring::tests::fork_in_its_own_process", "--ignored", "--nocapture"])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("1 passed"), "{}: {said}{errors}", output.status);
    }

    #[test]
    #[ignore = "started by ring_dropped_in_a_fork_unmaps_and_closes_nothing"]
    fn fork_in_its_own_process() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let fds = [file.as_raw_fd()];
        let ring = Uring::<()>::new(vec![file], Blocking::Never).unwrap();
        let fds = [fds[0], ring.event().unwrap().as_raw_fd()];
        let (addr, len) = mapping_of_a_ring();
        assert!(in_fork(|| {
            // New mappings and descriptors of a child may get the addresses and numbers of the
            // ring.
            let (prot, flags) = (libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let wanted = std::ptr::without_provenance_mut(addr);
            // SAFETY: the flag keeps existing mappings as they are.
            let mapped = unsafe { libc::mmap(wanted, len, prot, flags | libc::MAP_FIXED_NOREPLACE, -1, 0) };
            assert_eq!(mapped.addr(), addr, "{}", io::Error::last_os_error());
            drop(ring);
            // SAFETY: it queries a descriptor number.
            let open = fds.iter().all(|&fd| unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0);
            let mut residency = vec![0; len / 4096];
            // SAFETY: it queries whether the range is mapped, and writes one byte for each of its
            // pages.
            let still_mapped = unsafe { libc::mincore(mapped, len, residency.as_mut_ptr()) } == 0;
            assert!(open, "a descriptor was closed");
            assert!(still_mapped, "memory was unmapped");
            true
        }));
    }
}
