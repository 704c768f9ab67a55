//! Tap interfaces of the host: opening them, and what the kernel is told about them.
//!
//! A tap with several queues is opened once for each. Three ways lead to one:
//!
//! | given as        | what it is                                                                                     |
//! |-----------------|------------------------------------------------------------------------------------------------|
//! | a name          | the tap of that name; who has the right to makes one that does not exist, which goes with the monitor |
//! | `/dev/tapN`     | a macvtap: the character device of its lower half                                              |
//! | descriptors     | inherited ones, one for each queue, already attached to a tap                                  |
//!
//! Frames come and go with a [header](super::header) before them, so that checksums and segmentation are left to whoever has to do
//! them in the end.
//!
//! # One user at a time
//!
//! A tap that was made without `multi_queue` has one user: the kernel says so. Of one with `multi_queue`, and of a macvtap, anybody may open
//! more queues, and frames are then spread over two guests. So others are looked for, before a queue is opened and after, and a macvtap's
//! device is locked. Who gives descriptors sees to that itself.
//!
//! # Where unsafe is
//!
//! This is a leaf module: the requests of a tap take pointers to small structs.
#![expect(unsafe_code, reason = "ioctls")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Mutex;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::config_space::feature;
use super::header::HEADER_LEN;
use super::links;
use sync::locked;

const TUN: &str = "/dev/net/tun";

/// Which tap to open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TapSource<'a> {
    /// The tap of this name.
    Name(&'a str),
    /// A macvtap's character device.
    Device(&'a Path),
    /// Inherited descriptors.
    Descriptors(&'a [RawFd]),
}

impl<'a> TapSource<'a> {
    /// What the field `host_dev_name` means: a path where it begins with `/`, a name elsewhere.
    pub fn of(host_dev_name: &'a str) -> Self {
        if host_dev_name.starts_with('/') {
            TapSource::Device(Path::new(host_dev_name))
        } else {
            TapSource::Name(host_dev_name)
        }
    }
}

/// Why there is no tap.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// There is no such file, or it cannot be opened.
    #[error("cannot open {path}: {source}")]
    Open {
        /// Which.
        path: String,
        /// The kernel's reason.
        source: io::Error,
    },
    /// Somebody else has it.
    #[error("tap {name} is in use: each has one user at a time")]
    Busy {
        /// Its name.
        name: String,
    },
    /// It is to be there, and is not.
    #[error("there is no tap {name}")]
    Missing {
        /// Its name.
        name: String,
    },
    /// It does not exist, or it belongs to somebody else.
    #[error(
        "tap {name} cannot be used: it does not exist, or this user may not open it (ip tuntap add {name} mode tap user ...)"
    )]
    NotPermitted {
        /// Its name.
        name: String,
    },
    /// It was made without `multi_queue`, or it is no tap.
    #[error(
        "tap {name} cannot be opened with {queues} queues: it is no tap, or was made without multi_queue"
    )]
    Flags {
        /// Its name.
        name: String,
        /// How many queues were wanted.
        queues: u16,
    },
    /// An inherited descriptor that is none.
    #[error("descriptor {fd} is no tap that can be used: {why}")]
    Descriptor {
        /// Its number.
        fd: RawFd,
        /// What it lacks.
        why: &'static str,
    },
    /// The kernel refused a step of the set-up.
    #[error("cannot {step} of tap {name}: {source}")]
    Setup {
        /// Which step.
        step: &'static str,
        /// Its name.
        name: String,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// An open tap. Closing it gives it back.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<OwnedFd>,
    /// It takes UDP segmentation (Linux 6.2).
    uso: bool,
    /// It is a tap, not a test's socket.
    real: bool,
    /// It is a macvtap, which reads and writes as if nothing had happened when it is deleted.
    silent: bool,
    told: Mutex<Told>,
}

/// The settings that the kernel has. Each change takes its RTNL lock, so an unchanged setting is
/// not set again.
#[derive(Debug)]
struct Told {
    /// Changes so far.
    changes: u64,
    offloads: libc::c_uint,
    /// Queues in use; None where nobody knows.
    queues: Option<usize>,
}

impl Tap {
    /// Opens a tap with so many queues.
    pub fn open(source: TapSource<'_>, queues: u16) -> Result<Self, TapError> {
        let (silent, known) =
            (matches!(source, TapSource::Device(_)), !matches!(source, TapSource::Descriptors(_)));
        let (name, queues) = match source {
            TapSource::Name(name) => (name.to_owned(), open_named(name, queues)?),
            TapSource::Device(path) => (path.display().to_string(), open_devices(path, queues)?),
            TapSource::Descriptors(fds) => {
                let opened = fds.iter().map(|&fd| inherit(fd)).collect::<Result<Vec<_>, _>>()?;
                let list: Vec<String> = fds.iter().map(ToString::to_string).collect();
                (format!("of descriptor {}", list.join(", ")), opened)
            }
        };
        let setup = |step, source: Errno| TapError::Setup { step, name: name.clone(), source: source.into() };
        for queue in &queues {
            set_int(queue.as_fd(), libc::TUNSETVNETHDRSZ, HEADER_LEN as u32)
                .map_err(|source| setup("set the header's size", source))?;
            rustix::io::ioctl_fionbio(queue, true)
                .map_err(|source| setup("switch off the waiting", source))?;
        }
        let told = Mutex::new(Told {
            changes: 0,
            offloads: libc::c_uint::MAX,
            queues: known.then_some(queues.len()),
        });
        let mut tap = Tap { name, queues, uso: true, real: true, silent, told };
        // What a former user left behind is switched off; the driver's wishes come later.
        tap.uso = tap.set_offloads(feature::GUEST_CSUM | feature::GUEST_USO4 | feature::GUEST_USO6).is_ok();
        tap.set_offloads(0).map_err(|source| TapError::Setup {
            step: "set the offloads",
            name: tap.name.clone(),
            source: source.into(),
        })?;
        Ok(tap)
    }

    /// Something that behaves like a tap when it is read and written, for tests: one descriptor for each queue.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn pretend(queues: Vec<OwnedFd>) -> Self {
        let told = Mutex::new(Told { changes: 0, offloads: 0, queues: None });
        Tap { name: "pretended".into(), queues, uso: true, real: false, silent: false, told }
    }

    /// What the user calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The descriptors of its queues.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.queues.iter().map(AsRawFd::as_raw_fd)
    }

    /// Whether it does not say by itself that it was deleted.
    pub(super) fn is_silent(&self) -> bool {
        self.silent
    }

    /// Whether the interface is still there.
    pub(super) fn look(&self) -> Result<(), Errno> {
        if !self.real {
            return Ok(());
        }
        let mut request = request("", 0);
        // SAFETY: `request` is a `struct ifreq`, which this request writes.
        check(unsafe {
            libc::ioctl(self.queues[0].as_raw_fd(), libc::TUNGETIFF as libc::Ioctl, &raw mut request)
        })
    }

    /// How many queues it has.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// The descriptor of a queue. Panics beyond [`Tap::queues`].
    pub(super) fn queue(&self, index: usize) -> BorrowedFd<'_> {
        self.queues[index].as_fd()
    }

    /// The features that a device has because of it.
    pub(super) fn features(&self) -> u64 {
        let uso = if self.uso { feature::HOST_USO | feature::GUEST_USO4 | feature::GUEST_USO6 } else { 0 };
        feature::OFFLOADS | feature::MRG_RXBUF | uso
    }

    /// Number of ioctls under RTNL that [`Tap::set_offloads`] and [`Tap::use_queues`] would make; 0
    /// where nothing changes.
    pub(super) fn changes(&self, offloads: Option<u64>, queues: Option<usize>) -> u32 {
        let told = locked(&self.told);
        let offloads = offloads.is_some_and(|features| tap_offloads(features) != told.offloads);
        let queues = queues.map_or(0, |count| self.queues_to_change(&told, count).len());
        u32::from(offloads) + queues as u32
    }

    /// Indexes of the queues to attach or detach so that the first `count` are attached.
    fn queues_to_change(&self, told: &Told, count: usize) -> Range<usize> {
        let all = self.queues.len();
        if all < 2 {
            return 0..0;
        }
        // Where it is not known which are attached, all are set.
        let (from, to) = told.queues.map_or((0, all), |known| (known.min(count), known.max(count)));
        from.min(all)..to.min(all)
    }

    /// Lets the kernel leave to the guest what the `GUEST_` features among these allow.
    pub(super) fn set_offloads(&self, features: u64) -> Result<(), Errno> {
        let flags = tap_offloads(features);
        let mut told = locked(&self.told);
        if told.offloads == flags {
            return Ok(());
        }
        if self.real {
            // SAFETY: this request takes a number, not a pointer.
            check(unsafe {
                libc::ioctl(
                    self.queues[0].as_raw_fd(),
                    libc::TUNSETOFFLOAD as libc::Ioctl,
                    libc::c_ulong::from(flags),
                )
            })?;
        }
        told.offloads = flags;
        told.changes += 1;
        Ok(())
    }

    /// Lets the kernel spread frames over the first `count` queues and no others.
    pub(super) fn use_queues(&self, count: usize) -> Result<(), Errno> {
        let mut told = locked(&self.told);
        let range = self.queues_to_change(&told, count);
        told.changes += range.len() as u64;
        told.queues = None;
        for index in range {
            let flag = if index < count { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
            match self.set_queue(index, flag) {
                // It is attached or detached already.
                Ok(()) | Err(Errno::INVAL) => {}
                Err(error) => return Err(error),
            }
        }
        told.queues = Some(count);
        Ok(())
    }

    fn set_queue(&self, index: usize, flag: libc::c_int) -> Result<(), Errno> {
        if !self.real {
            return Ok(());
        }
        let mut request = request("", flag);
        // SAFETY: `request` is a `struct ifreq`, which this request reads.
        check(unsafe {
            libc::ioctl(self.queues[index].as_raw_fd(), libc::TUNSETQUEUE as libc::Ioctl, &raw mut request)
        })
    }

    /// Settings of a test's tap: features that are left to the guest as `TUN_F_` flags, queues, and
    /// changes so far.
    #[cfg(test)]
    pub(super) fn settings(&self) -> (libc::c_uint, Option<usize>, u64) {
        let told = locked(&self.told);
        (told.offloads, told.queues, told.changes)
    }
}

/// The `TUN_F_` flags of the `GUEST_` features among these.
pub(super) fn tap_offloads(features: u64) -> libc::c_uint {
    let mut flags = 0;
    for (bit, flag) in [
        (feature::GUEST_CSUM, libc::TUN_F_CSUM),
        (feature::GUEST_TSO4, libc::TUN_F_TSO4),
        (feature::GUEST_TSO6, libc::TUN_F_TSO6),
        (feature::GUEST_ECN, libc::TUN_F_TSO_ECN),
        (feature::GUEST_UFO, libc::TUN_F_UFO),
        (feature::GUEST_USO4, TUN_F_USO4),
        (feature::GUEST_USO6, TUN_F_USO6),
    ] {
        if features & bit != 0 {
            flags |= flag;
        }
    }
    // The kernel takes both or none.
    if flags & (TUN_F_USO4 | TUN_F_USO6) != TUN_F_USO4 | TUN_F_USO6 {
        flags &= !(TUN_F_USO4 | TUN_F_USO6);
    }
    // It is about TCP, which has to be left to the guest for that.
    if flags & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6) == 0 {
        flags &= !libc::TUN_F_TSO_ECN;
    }
    // All else means nothing without checksums.
    if flags & libc::TUN_F_CSUM == 0 {
        flags = 0;
    }
    flags
}

/// Whether this error means that the interface behind a descriptor is gone for good.
pub(super) fn is_gone(error: Errno) -> bool {
    matches!(
        error,
        Errno::BADFD
            | Errno::NODEV
            | Errno::NXIO
            | Errno::BADF
            | Errno::NOLINK
            | Errno::NOTCONN
            | Errno::PIPE
            | Errno::CONNRESET
    )
}

const TUN_F_USO4: libc::c_uint = 0x20;
const TUN_F_USO6: libc::c_uint = 0x40;

/// What we want of a tap: frames without a packet header of its own, with one of virtio's.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

fn open_named(name: &str, queues: u16) -> Result<Vec<OwnedFd>, TapError> {
    if queues == 1 {
        match attach(name, FLAGS) {
            // A tap that was made for several queues can be used with one.
            Err(AttachError::Refused(Errno::INVAL)) => {}
            other => return other.map(|queue| vec![queue]).map_err(|error| error.of(name, queues)),
        }
    }
    let multi = FLAGS | libc::IFF_MULTI_QUEUE;
    if users(name)? > 0 {
        return Err(TapError::Busy { name: name.into() });
    }
    let attached: Vec<_> = (0..queues)
        .map(|_| attach(name, multi))
        .collect::<Result<_, _>>()
        .map_err(|error| error.of(name, queues))?;
    // Somebody may have come at the same time.
    if users(name)? > u32::from(queues) {
        return Err(TapError::Busy { name: name.into() });
    }
    Ok(attached)
}

/// How many queues of the tap `name`, which was made for several, are attached.
fn users(name: &str) -> Result<u32, TapError> {
    Ok(find(name)?.map_or(0, |link| link.queues))
}

/// Whether there is an interface of that name.
pub(super) fn exists(name: &str) -> Result<bool, TapError> {
    Ok(find(name)?.is_some())
}

fn find(name: &str) -> Result<Option<links::LinkInfo>, TapError> {
    links::find(name).map_err(|source| TapError::Setup {
        step: "find the users",
        name: name.into(),
        source: source.into(),
    })
}

enum AttachError {
    Open(io::Error),
    Refused(Errno),
}

impl AttachError {
    fn of(self, name: &str, queues: u16) -> TapError {
        let name = name.to_owned();
        match self {
            AttachError::Open(source) => TapError::Open { path: TUN.into(), source },
            AttachError::Refused(Errno::BUSY) => TapError::Busy { name },
            AttachError::Refused(Errno::PERM) => TapError::NotPermitted { name },
            AttachError::Refused(Errno::INVAL) => TapError::Flags { name, queues },
            AttachError::Refused(errno) => {
                TapError::Setup { step: "attach to a queue", name, source: errno.into() }
            }
        }
    }
}

fn attach(name: &str, flags: libc::c_int) -> Result<OwnedFd, AttachError> {
    let file = open(Path::new(TUN)).map_err(AttachError::Open)?;
    let mut request = request(name, flags);
    // SAFETY: `request` is a `struct ifreq`, which this request reads and writes.
    let done =
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as libc::Ioctl, &raw mut request) });
    done.map_err(AttachError::Refused)?;
    Ok(file.into())
}

fn open_devices(path: &Path, queues: u16) -> Result<Vec<OwnedFd>, TapError> {
    let name = path.display().to_string();
    let flags = if queues > 1 { FLAGS | libc::IFF_MULTI_QUEUE } else { FLAGS };
    let one = |first: bool| {
        let file = open(path).map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => TapError::Busy { name: name.clone() },
            _ => TapError::Open { path: name.clone(), source },
        })?;
        if first {
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
                .map_err(|_| TapError::Busy { name: name.clone() })?;
        }
        let mut request = request("", flags);
        // SAFETY: `request` is a `struct ifreq`, which this request reads.
        let done =
            check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as libc::Ioctl, &raw mut request) });
        done.map_err(|errno| match errno {
            Errno::NOTTY | Errno::INVAL => TapError::Flags { name: name.clone(), queues },
            errno => TapError::Setup { step: "set the flags", name: name.clone(), source: errno.into() },
        })?;
        Ok(file.into())
    };
    (0..queues).map(|queue| one(queue == 0)).collect()
}

/// A copy of an inherited descriptor, if it is a tap's.
fn inherit(fd: RawFd) -> Result<OwnedFd, TapError> {
    let refuse = |why| TapError::Descriptor { fd, why };
    if fd < 0 {
        return Err(refuse("it is negative"));
    }
    // SAFETY: the descriptor is only copied, in this expression. If nobody has opened it, the copy fails; if it is another part's of
    // this process, the copy leaves that one alone.
    let copy = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned();
    let copy = copy.map_err(|_| refuse("it is not open"))?;
    let mut request = request("", 0);
    // SAFETY: `request` is a `struct ifreq`, which this request writes.
    let done =
        check(unsafe { libc::ioctl(copy.as_raw_fd(), libc::TUNGETIFF as libc::Ioctl, &raw mut request) });
    done.map_err(|_| refuse("it is something else, or attached to none"))?;
    // SAFETY: the request filled in the flags; any bits are a number.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    if flags & FLAGS != FLAGS {
        return Err(refuse("it must be a tap with IFF_NO_PI and IFF_VNET_HDR"));
    }
    Ok(copy)
}

fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path)
}

/// A `struct ifreq` with a name, cut to what fits, and flags.
fn request(name: &str, flags: libc::c_int) -> libc::ifreq {
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags as libc::c_short } }
}

fn set_int(fd: BorrowedFd<'_>, request: u64, value: u32) -> Result<(), Errno> {
    // SAFETY: all requests that come here read one `int`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::Ioctl, &raw const value) })
}

fn check(returned: libc::c_int) -> Result<(), Errno> {
    if returned >= 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A name for a tap that nobody else has.
    fn name(tag: &str) -> String {
        format!("vtu{}{tag}", std::process::id() % 1_000_000)
    }

    fn can_make_taps() -> bool {
        Tap::open(TapSource::Name(&name("p")), 1).is_ok()
    }

    #[test]
    fn a_tap_has_one_user_at_a_time_and_is_free_again_when_closed() {
        if !can_make_taps() {
            return eprintln!("this user cannot make taps");
        }
        let name = name("a");
        let tap = Tap::open(TapSource::Name(&name), 1).unwrap();
        assert!(matches!(Tap::open(TapSource::Name(&name), 1), Err(TapError::Busy { .. })));
        drop(tap);
        assert_eq!(Tap::open(TapSource::Name(&name), 1).unwrap().queues(), 1);
    }

    #[test]
    fn a_tap_of_one_queue_cannot_be_opened_with_several_and_one_of_several_has_one_user() {
        if !can_make_taps() {
            return eprintln!("this user cannot make taps");
        }
        let name = name("b");
        let one = Tap::open(TapSource::Name(&name), 1).unwrap();
        assert!(matches!(Tap::open(TapSource::Name(&name), 2), Err(TapError::Flags { queues: 2, .. })));
        drop(one);
        let two = Tap::open(TapSource::Name(&name), 2).unwrap();
        for queues in [1, 2, 3] {
            let shared = Tap::open(TapSource::Name(&name), queues);
            assert!(matches!(shared, Err(TapError::Busy { .. })), "{queues}: {shared:?}");
        }
        two.use_queues(1).unwrap();
        assert!(matches!(Tap::open(TapSource::Name(&name), 1), Err(TapError::Busy { .. })));
        two.use_queues(2).unwrap();
        two.use_queues(2).unwrap();
    }

    #[test]
    fn offloads_of_all_combinations_are_taken() {
        if !can_make_taps() {
            return eprintln!("this user cannot make taps");
        }
        let tap = Tap::open(TapSource::Name(&name("c")), 1).unwrap();
        let ecn = feature::GUEST_CSUM | feature::GUEST_ECN;
        for features in [0, ecn, feature::GUEST_CSUM, feature::GUEST_TSO4, tap.features(), u64::MAX] {
            tap.set_offloads(features).unwrap();
        }
    }

    #[test]
    fn descriptors_are_looked_at_before_they_are_used() {
        let file = tempfile::tempfile().unwrap();
        for fd in [-1, 1_000_000, file.as_raw_fd()] {
            let refused = Tap::open(TapSource::Descriptors(&[fd]), 1).unwrap_err();
            assert!(refused.to_string().contains(&fd.to_string()), "{refused}");
        }
        if can_make_taps() {
            let tap = Tap::open(TapSource::Name(&name("d")), 1).unwrap();
            let fd = tap.queue(0).as_raw_fd();
            assert_eq!(Tap::open(TapSource::Descriptors(&[fd]), 1).unwrap().queues(), 1);
        }
    }

    #[test]
    fn what_is_no_macvtap_is_refused_by_name() {
        for path in ["/dev/null", "/nowhere/tap7"] {
            let refused = Tap::open(TapSource::of(path), 1).unwrap_err();
            assert!(refused.to_string().contains(path), "{refused}");
        }
    }
}
