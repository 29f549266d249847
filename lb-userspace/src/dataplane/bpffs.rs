//! Where pins live: a bpffs that outlives the daemon, also when the daemon runs in a mount namespace of its own.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context, Result, bail};
use lb_common::layout::ABI_VERSION;
use rustix::{
    fs::{Mode, OFlags, open, statfs},
    mount::{MountFlags, UnmountFlags, mount, unmount},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space},
};

/// `BPF_FS_MAGIC`, linux/magic.h.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

/// The directory of this layout's pins.
#[derive(Debug)]
pub(super) struct PinDirectory {
    path: PathBuf,
    /// Keeps the bpffs reachable when it is mounted in another mount namespace.
    _root: Option<OwnedFd>,
    /// Where this process has mounted it itself.
    mounted: Option<PathBuf>,
    /// Directories of other layouts that were there before this one was opened.
    before: Vec<PathBuf>,
}

impl PinDirectory {
    /// Opens the directory below `root`, mounting a bpffs at `root` when none is there.
    ///
    /// `ip netns exec` and service sandboxes give the daemon a mount namespace that ends with it; a bpffs mounted there
    /// would take the pins along. So the mount is made where process 1 lives, if that is elsewhere.
    ///
    /// # Errors
    ///
    /// When the path cannot be made, or no bpffs can be mounted there.
    pub(super) fn open(root: &Path) -> Result<Self> {
        fs::create_dir_all(root)
            .with_context(|| format!("cannot make the directory {}", root.display()))?;
        let mut mounted = None;
        let (base, keep) = if is_bpffs(root) {
            (root.to_owned(), None)
        } else {
            mounted = Some(root.to_owned());
            let fd = mount_bpffs(root).with_context(|| {
                format!(
                    "cannot mount a bpffs at {}; mount one there before (mount -t bpf bpf {0}) or name another with --bpffs",
                    root.display()
                )
            })?;
            match is_bpffs(root) {
                true => (root.to_owned(), None),
                false => (
                    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd())),
                    Some(fd),
                ),
            }
        };
        let path = base.join(format!("v{ABI_VERSION}"));
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        let mut pins = Self {
            path,
            _root: keep,
            mounted,
            before: Vec::new(),
        };
        pins.before = pins.others();
        Ok(pins)
    }

    /// Where a pin of this name lies.
    pub(super) fn pin(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Names of the pins that are there.
    pub(super) fn names(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(&self.path) else {
            return Vec::new();
        };
        let mut names: Vec<_> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }

    /// Directories of other layouts: what an older or newer smtplb has left.
    pub(super) fn others(&self) -> Vec<PathBuf> {
        let Some(Ok(entries)) = self.path.parent().map(fs::read_dir) else {
            return Vec::new();
        };
        let is_layout = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str());
            let number = name.and_then(|name| name.strip_prefix('v'));
            number.is_some_and(|number| number.parse::<u32>().is_ok()) && *path != self.path
        };
        let paths = entries.flatten().map(|entry| entry.path());
        paths.filter(is_layout).collect()
    }

    /// Has an smtplb of another layout, which came later, got as far as to steer? Its pin of this name is its last step
    /// before it serves.
    pub(super) fn has_successor(&self, last: &str) -> bool {
        let others = self.others();
        let mut later = others.iter().filter(|path| !self.before.contains(path));
        later.any(|path| path.join(last).exists())
    }

    /// Removes the layouts that were there before this one.
    ///
    /// # Errors
    ///
    /// When one cannot be removed.
    pub(super) fn clear_earlier(&self) -> io::Result<()> {
        let others = self.others();
        let mut earlier = others.iter().filter(|path| self.before.contains(path));
        earlier.try_for_each(|path| clear_directory(path))
    }

    /// Removes one pin; what nobody else holds is gone from the kernel.
    ///
    /// # Errors
    ///
    /// When it is there and cannot be removed.
    pub(super) fn unpin(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.pin(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Removes every pin of this layout, its directory, and, when no other layout is there, the mount if this process
    /// made it.
    ///
    /// # Errors
    ///
    /// When one cannot be removed.
    pub(super) fn clear(&self) -> io::Result<()> {
        for name in self.names() {
            self.unpin(&name)?;
        }
        fs::remove_dir(&self.path)?;
        if let Some(root) = &self.mounted
            && self.others().is_empty()
        {
            unmount_bpffs(root);
        }
        Ok(())
    }
}

/// Removes the pins in a directory, and it.
///
/// # Errors
///
/// When one cannot be removed.
pub(super) fn clear_directory(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        fs::remove_file(entry?.path())?;
    }
    fs::remove_dir(path)
}

fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|stat| stat.f_type as u64 == BPF_FS_MAGIC)
}

/// Mounts a bpffs in the mount namespace of process 1, or in our own when that is the same or closed to us.
fn mount_bpffs(root: &Path) -> Result<OwnedFd> {
    if same_namespace() {
        return mount_here(root);
    }
    let path = root.to_owned();
    let outside = outside(move || {
        fs::create_dir_all(&path)?;
        mount_here(&path)
    });
    outside.or_else(|error| {
        log::warn!(
            "bpffs: cannot mount outside of this mount namespace ({error:#}); the pins end with it"
        );
        mount_here(root)
    })
}

fn mount_here(root: &Path) -> Result<OwnedFd> {
    if !is_bpffs(root) {
        mount("bpf", root, "bpf", MountFlags::empty(), Some(c"mode=0700"))?;
    }
    Ok(open(
        root,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// Takes down what [`mount_bpffs`] has mounted, wherever that was; whoever else uses it keeps it.
fn unmount_bpffs(root: &Path) {
    let path = root.to_owned();
    let done = match same_namespace() {
        true => unmount(root, UnmountFlags::DETACH).map_err(Into::into),
        false => outside(move || Ok(unmount(&path, UnmountFlags::DETACH)?)),
    };
    if let Err(error) = done {
        log::debug!("{} stays mounted: {error:#}", root.display());
    }
}

/// Does something in the mount namespace of process 1, on a thread of its own: the namespace of a thread that shares its
/// root directory with others cannot change.
fn outside<T: Send + 'static>(act: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let thread = thread::spawn(move || {
        let namespace = fs::File::open("/proc/1/ns/mnt")?;
        #[expect(
            unsafe_code,
            reason = "only this thread's root and working directory are unshared, and it ends here"
        )]
        // SAFETY: no other thread relies on this one's filesystem attributes.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))?;
        act()
    });
    thread
        .join()
        .unwrap_or_else(|_| bail!("the thread panicked"))
}

fn same_namespace() -> bool {
    match (
        fs::read_link("/proc/1/ns/mnt"),
        fs::read_link("/proc/self/ns/mnt"),
    ) {
        (Ok(first), Ok(own)) => first == own,
        _ => true,
    }
}
