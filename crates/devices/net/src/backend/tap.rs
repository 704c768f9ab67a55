//! Tap and macvtap interfaces of the host, and their settings in the kernel.
//!
//! A tap with several queues is opened once for each queue. It is given in one of three ways:
//!
//! | given as    | what it is                                                                     |
//! |-------------|--------------------------------------------------------------------------------|
//! | a name      | the tap of that name; created if it does not exist and this user may create it |
//! | `/dev/tapN` | the character device of a macvtap                                              |
//! | descriptors | inherited descriptors, one for each queue, attached to a tap already           |
//!
//! A tap that was created here is deleted when the monitor closes it. Each frame has a
//! [header](crate::header) before it, so that checksums and segmentation can be left to the
//! receiver.
//!
//! # One user at a time
//!
//! The kernel allows one user of a tap without `multi_queue`. Any process may open more queues of a
//! tap with `multi_queue`, and of a macvtap, and the kernel then spreads the frames over two
//! guests. So this module looks for other users before and after it opens the queues of a tap, and
//! locks the device of a macvtap. For inherited descriptors this is up to the caller.
//!
//! # Where unsafe is
//!
//! This is a leaf module: the ioctls of a tap take pointers to small structs.
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

use super::rtnetlink;
use crate::config_space::feature;
use crate::header::HEADER_LEN;
use sync::locked;

const TUN: &str = "/dev/net/tun";

/// The tap to open.
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
    /// Parses the field `host_dev_name`: a path if it begins with `/`, otherwise a name.
    pub fn of(host_dev_name: &'a str) -> Self {
        if host_dev_name.starts_with('/') {
            TapSource::Device(Path::new(host_dev_name))
        } else {
            TapSource::Name(host_dev_name)
        }
    }
}

/// Why a tap cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Its device file cannot be opened.
    #[error("cannot open {path}: {source}")]
    Open {
        /// Path of the device file.
        path: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// Another process or interface uses it.
    #[error("tap {name}: in use; a tap has one user at a time")]
    Busy {
        /// Name of the tap.
        name: String,
    },
    /// It does not exist, and must not be created.
    #[error("tap {name}: does not exist")]
    Missing {
        /// Name of the tap.
        name: String,
    },
    /// It does not exist and cannot be created, or it belongs to another user.
    #[error(
        "tap {name}: does not exist, or this user may not open it; create it: ip tuntap add {name} mode tap user USER"
    )]
    NotPermitted {
        /// Name of the tap.
        name: String,
    },
    /// It was created without `multi_queue`, or is not a tap.
    #[error("tap {name}: cannot open {queues} queues; it is not a tap, or was created without multi_queue")]
    Flags {
        /// Name of the tap.
        name: String,
        /// Number of queues requested.
        queues: u16,
    },
    /// An inherited descriptor is not a usable tap.
    #[error("descriptor {fd}: not a usable tap: {why}")]
    Descriptor {
        /// The descriptor.
        fd: RawFd,
        /// The reason.
        why: &'static str,
    },
    /// The kernel refused a step of the set-up.
    #[error("tap {name}: cannot {step}: {source}")]
    Setup {
        /// The step that failed.
        step: &'static str,
        /// Name of the tap.
        name: String,
        /// The kernel's error.
        source: io::Error,
    },
}

/// An open tap or macvtap. Dropping it closes its queues.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<OwnedFd>,
    /// Whether the kernel supports UDP segmentation offload (Linux 6.2).
    uso: bool,
    /// Whether the queues are sockets of a test, to which no ioctl of a tap applies.
    fake: bool,
    /// Whether it is a macvtap. Reads and writes of a deleted macvtap return no error.
    macvtap: bool,
    settings: Mutex<Settings>,
}

/// The settings of a tap in the kernel. Each change takes the kernel's RTNL lock, so an unchanged
/// setting is not set again.
#[derive(Debug)]
struct Settings {
    /// Number of changes so far.
    changes: u64,
    /// `TUN_F_` flags.
    offloads: libc::c_uint,
    /// Number of active queues. None: unknown.
    active_queues: Option<usize>,
}

impl Tap {
    /// Opens a tap with this number of queues.
    pub fn open(source: TapSource<'_>, queues: u16) -> Result<Self, TapError> {
        let macvtap = matches!(source, TapSource::Device(_));
        let inherited = matches!(source, TapSource::Descriptors(_));
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
                .map_err(|source| setup("set the size of its header", source))?;
            rustix::io::ioctl_fionbio(queue, true).map_err(|source| setup("make it non-blocking", source))?;
        }
        let settings = Mutex::new(Settings {
            changes: 0,
            offloads: libc::c_uint::MAX,
            active_queues: (!inherited).then_some(queues.len()),
        });
        let mut tap = Tap { name, queues, uso: true, fake: false, macvtap, settings };
        // Clears what a former user has set. The driver's offloads are set when its device starts.
        tap.uso = tap.set_offloads(feature::GUEST_CSUM | feature::GUEST_USO4 | feature::GUEST_USO6).is_ok();
        tap.set_offloads(0).map_err(|source| TapError::Setup {
            step: "set its offloads",
            name: tap.name.clone(),
            source: source.into(),
        })?;
        Ok(tap)
    }

    /// A fake tap for tests, with one socket for each queue.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn fake(queues: Vec<OwnedFd>) -> Self {
        let settings = Mutex::new(Settings { changes: 0, offloads: 0, active_queues: None });
        Tap { name: "fake".into(), queues, uso: true, fake: true, macvtap: false, settings }
    }

    /// The name, path or descriptors that the user gave.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The descriptors of its queues.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.queues.iter().map(AsRawFd::as_raw_fd)
    }

    /// Whether it is a macvtap. Reads and writes of a deleted macvtap return no error.
    pub(crate) fn is_macvtap(&self) -> bool {
        self.macvtap
    }

    /// Asks the kernel whether the interface still exists.
    pub(crate) fn probe(&self) -> Result<(), Errno> {
        if self.fake {
            return Ok(());
        }
        let mut request = request("", 0);
        // SAFETY: `request` is a `struct ifreq`, which this ioctl writes.
        check(unsafe {
            libc::ioctl(self.queues[0].as_raw_fd(), libc::TUNGETIFF as libc::Ioctl, &raw mut request)
        })
    }

    /// Number of queues.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// The descriptor of a queue. Panics beyond [`Tap::queues`].
    pub(crate) fn queue(&self, index: usize) -> BorrowedFd<'_> {
        self.queues[index].as_fd()
    }

    /// Device features that the tap supports.
    pub(crate) fn features(&self) -> u64 {
        let uso = if self.uso { feature::HOST_USO | feature::GUEST_USO4 | feature::GUEST_USO6 } else { 0 };
        feature::OFFLOADS | feature::MRG_RXBUF | uso
    }

    /// Number of ioctls under RTNL that [`Tap::set_offloads`] and [`Tap::set_active_queues`] would
    /// make. 0 if nothing changes.
    pub(crate) fn rtnl_ioctls(&self, offloads: Option<u64>, queues: Option<usize>) -> u32 {
        let settings = locked(&self.settings);
        let offloads = offloads.is_some_and(|features| tap_offloads(features) != settings.offloads);
        let queues = queues.map_or(0, |count| self.queues_to_change(&settings, count).len());
        u32::from(offloads) + queues as u32
    }

    /// Indexes of the queues to attach or detach so that the first `count` are attached.
    fn queues_to_change(&self, settings: &Settings, count: usize) -> Range<usize> {
        let all = self.queues.len();
        if all < 2 {
            return 0..0;
        }
        // All are set if it is unknown which are attached.
        let (from, to) =
            settings.active_queues.map_or((0, all), |known| (known.min(count), known.max(count)));
        from.min(all)..to.min(all)
    }

    /// Sets the offloads for frames to the guest: the `GUEST_` bits of `features`.
    pub(crate) fn set_offloads(&self, features: u64) -> Result<(), Errno> {
        let flags = tap_offloads(features);
        let mut settings = locked(&self.settings);
        if settings.offloads == flags {
            return Ok(());
        }
        if !self.fake {
            // SAFETY: this ioctl takes a number, not a pointer.
            check(unsafe {
                libc::ioctl(
                    self.queues[0].as_raw_fd(),
                    libc::TUNSETOFFLOAD as libc::Ioctl,
                    libc::c_ulong::from(flags),
                )
            })?;
        }
        settings.offloads = flags;
        settings.changes += 1;
        Ok(())
    }

    /// Attaches the first `count` queues and detaches the others. The kernel spreads the frames for
    /// the guest over attached queues only.
    pub(crate) fn set_active_queues(&self, count: usize) -> Result<(), Errno> {
        let mut settings = locked(&self.settings);
        let range = self.queues_to_change(&settings, count);
        settings.changes += range.len() as u64;
        settings.active_queues = None;
        for index in range {
            let flag = if index < count { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
            match self.set_queue(index, flag) {
                // It is attached or detached already.
                Ok(()) | Err(Errno::INVAL) => {}
                Err(error) => return Err(error),
            }
        }
        settings.active_queues = Some(count);
        Ok(())
    }

    fn set_queue(&self, index: usize, flag: libc::c_int) -> Result<(), Errno> {
        if self.fake {
            return Ok(());
        }
        let mut request = request("", flag);
        // SAFETY: `request` is a `struct ifreq`, which this ioctl reads.
        check(unsafe {
            libc::ioctl(self.queues[index].as_raw_fd(), libc::TUNSETQUEUE as libc::Ioctl, &raw mut request)
        })
    }

    /// The settings for a test: `TUN_F_` flags, active queues, and the number of changes so far.
    #[cfg(test)]
    pub(crate) fn settings(&self) -> (libc::c_uint, Option<usize>, u64) {
        let settings = locked(&self.settings);
        (settings.offloads, settings.active_queues, settings.changes)
    }
}

/// Translates the `GUEST_` bits of `features` into `TUN_F_` flags.
pub(crate) fn tap_offloads(features: u64) -> libc::c_uint {
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
    // The kernel accepts both or neither.
    if flags & (TUN_F_USO4 | TUN_F_USO6) != TUN_F_USO4 | TUN_F_USO6 {
        flags &= !(TUN_F_USO4 | TUN_F_USO6);
    }
    // ECN needs TCP segmentation offload.
    if flags & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6) == 0 {
        flags &= !libc::TUN_F_TSO_ECN;
    }
    // All others need checksum offload.
    if flags & libc::TUN_F_CSUM == 0 {
        flags = 0;
    }
    flags
}

/// Whether `error` means that the interface or peer behind a descriptor is gone for good.
pub(crate) fn is_gone(error: Errno) -> bool {
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

/// Flags of every tap here: Ethernet frames with a virtio header and without packet information.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

fn open_named(name: &str, queues: u16) -> Result<Vec<OwnedFd>, TapError> {
    if queues == 1 {
        match attach(name, FLAGS) {
            // A tap with `multi_queue` refuses a user without the flag: try with it below.
            Err(AttachError::Refused(Errno::INVAL)) => {}
            other => return other.map(|queue| vec![queue]).map_err(|error| error.of(name, queues)),
        }
    }
    let multi = FLAGS | libc::IFF_MULTI_QUEUE;
    if attached_queues(name)? > 0 {
        return Err(TapError::Busy { name: name.into() });
    }
    let attached: Vec<_> = (0..queues)
        .map(|_| attach(name, multi))
        .collect::<Result<_, _>>()
        .map_err(|error| error.of(name, queues))?;
    // Another process may have attached queues at the same time.
    if attached_queues(name)? > u32::from(queues) {
        return Err(TapError::Busy { name: name.into() });
    }
    Ok(attached)
}

/// Number of attached queues of the tap `name`. 0 if it does not exist.
fn attached_queues(name: &str) -> Result<u32, TapError> {
    Ok(find(name)?.map_or(0, |link| link.queues))
}

/// Whether the host has an interface of this name.
pub(super) fn exists(name: &str) -> Result<bool, TapError> {
    Ok(find(name)?.is_some())
}

fn find(name: &str) -> Result<Option<rtnetlink::LinkInfo>, TapError> {
    rtnetlink::find(name).map_err(|source| TapError::Setup {
        step: "look it up",
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
                TapError::Setup { step: "attach a queue", name, source: errno.into() }
            }
        }
    }
}

fn attach(name: &str, flags: libc::c_int) -> Result<OwnedFd, AttachError> {
    let file = open(Path::new(TUN)).map_err(AttachError::Open)?;
    let mut request = request(name, flags);
    // SAFETY: `request` is a `struct ifreq`, which this ioctl reads and writes.
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
        // SAFETY: `request` is a `struct ifreq`, which this ioctl reads.
        let done =
            check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as libc::Ioctl, &raw mut request) });
        done.map_err(|errno| match errno {
            Errno::NOTTY | Errno::INVAL => TapError::Flags { name: name.clone(), queues },
            errno => TapError::Setup { step: "set its flags", name: name.clone(), source: errno.into() },
        })?;
        Ok(file.into())
    };
    (0..queues).map(|queue| one(queue == 0)).collect()
}

/// Duplicates an inherited descriptor after a check that it is a usable tap.
fn inherit(fd: RawFd) -> Result<OwnedFd, TapError> {
    let refuse = |why| TapError::Descriptor { fd, why };
    if fd < 0 {
        return Err(refuse("it is negative"));
    }
    // SAFETY: the descriptor is duplicated in this expression and not used after it. If it is not
    // open, that fails. If another part of this process owns it, its owner is not affected.
    let copy = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned();
    let copy = copy.map_err(|_| refuse("it is not open"))?;
    let mut request = request("", 0);
    // SAFETY: `request` is a `struct ifreq`, which this ioctl writes.
    let done =
        check(unsafe { libc::ioctl(copy.as_raw_fd(), libc::TUNGETIFF as libc::Ioctl, &raw mut request) });
    done.map_err(|_| refuse("it is another kind of file, or is not attached to a tap"))?;
    // SAFETY: the ioctl has filled in the flags, and any bits are a valid number.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    if flags & FLAGS != FLAGS {
        return Err(refuse("it lacks IFF_TAP, IFF_NO_PI or IFF_VNET_HDR"));
    }
    Ok(copy)
}

fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path)
}

/// A `struct ifreq` with a name, truncated to `IFNAMSIZ`, and flags.
fn request(name: &str, flags: libc::c_int) -> libc::ifreq {
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags as libc::c_short } }
}

fn set_int(fd: BorrowedFd<'_>, request: u64, value: u32) -> Result<(), Errno> {
    // SAFETY: every ioctl that is passed here reads one `int`.
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

    /// A tap name that is unique to this test process.
    fn name(tag: &str) -> String {
        format!("vtu{}{tag}", std::process::id() % 1_000_000)
    }

    fn can_create_taps() -> bool {
        Tap::open(TapSource::Name(&name("p")), 1).is_ok()
    }

    #[test]
    fn tap_has_one_user_until_it_is_closed() {
        if !can_create_taps() {
            return eprintln!("skipped: this user cannot create taps");
        }
        let name = name("a");
        let tap = Tap::open(TapSource::Name(&name), 1).unwrap();
        assert!(matches!(Tap::open(TapSource::Name(&name), 1), Err(TapError::Busy { .. })));
        drop(tap);
        assert_eq!(Tap::open(TapSource::Name(&name), 1).unwrap().queues(), 1);
    }

    #[test]
    fn single_queue_tap_refuses_two_queues_and_multi_queue_is_busy() {
        if !can_create_taps() {
            return eprintln!("skipped: this user cannot create taps");
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
        two.set_active_queues(1).unwrap();
        assert!(matches!(Tap::open(TapSource::Name(&name), 1), Err(TapError::Busy { .. })));
        two.set_active_queues(2).unwrap();
        two.set_active_queues(2).unwrap();
    }

    #[test]
    fn kernel_accepts_every_combination_of_offloads() {
        if !can_create_taps() {
            return eprintln!("skipped: this user cannot create taps");
        }
        let tap = Tap::open(TapSource::Name(&name("c")), 1).unwrap();
        let ecn = feature::GUEST_CSUM | feature::GUEST_ECN;
        for features in [0, ecn, feature::GUEST_CSUM, feature::GUEST_TSO4, tap.features(), u64::MAX] {
            tap.set_offloads(features).unwrap();
        }
    }

    #[test]
    fn inherited_descriptors_are_checked() {
        let file = tempfile::tempfile().unwrap();
        for fd in [-1, 1_000_000, file.as_raw_fd()] {
            let refused = Tap::open(TapSource::Descriptors(&[fd]), 1).unwrap_err();
            assert!(refused.to_string().contains(&fd.to_string()), "{refused}");
        }
        if can_create_taps() {
            let tap = Tap::open(TapSource::Name(&name("d")), 1).unwrap();
            let fd = tap.queue(0).as_raw_fd();
            assert_eq!(Tap::open(TapSource::Descriptors(&[fd]), 1).unwrap().queues(), 1);
        }
    }

    #[test]
    fn path_that_is_not_a_macvtap_is_an_error_with_its_path() {
        for path in ["/dev/null", "/nowhere/tap7"] {
            let refused = Tap::open(TapSource::of(path), 1).unwrap_err();
            assert!(refused.to_string().contains(path), "{refused}");
        }
    }
}
