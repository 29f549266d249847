//! The admin socket's file: private from birth, and handed over without a gap.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::{
        fs::{DirBuilderExt, FileTypeExt},
        net::UnixListener,
    },
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, fchmod};
use socket2::{Domain, SockAddr, Socket, Type};

/// Connections the kernel keeps for us while the cap of the server is reached.
const BACKLOG: i32 = 128;

/// Listens on `path`, replacing whatever socket is there.
///
/// The new socket listens under a name of its own before it is renamed over `path`: a client meets the old
/// daemon or the new one, never nobody, and the file of a daemon that was killed does not hinder.
/// The listener is nonblocking; only the owner of the process may connect (mode 0600).
///
/// Nobody removes the file at the end: it may already be a successor's.
///
/// # Errors
/// When `path` is something else than a socket, too long for one (107 bytes, with the process id appended),
/// or its directory cannot be made or written.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    let (listener, place) = listen_aside(path)?;
    place.take()?;
    Ok(listener)
}

/// As [`bind`], but whoever is at `path` stays there until [`Place::take`].
///
/// # Errors
/// As [`bind`].
pub fn listen_aside(path: &Path) -> io::Result<(UnixListener, Place)> {
    if let Some(parent) = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
    {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(parent)?;
    }
    refuse_other_files(path)?;

    let place = Place {
        aside: aside(path),
        path: path.to_owned(),
    };
    // A killed process of the same id may have left its own.
    remove_if_present(&place.aside)?;
    Ok((listen(&place.aside)?, place))
}

/// The path that a socket is to have, which still has a name of its own. Dropped, it leaves nothing behind.
#[derive(Debug)]
pub struct Place {
    aside: PathBuf,
    path: PathBuf,
}

impl Place {
    /// From now on clients come to this socket.
    ///
    /// # Errors
    /// When the file cannot be renamed.
    pub fn take(self) -> io::Result<()> {
        fs::rename(&self.aside, &self.path)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = remove_if_present(&self.aside);
    }
}

fn refuse_other_files(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "there is a file of another kind, and it is not replaced",
        )),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    name.into()
}

fn remove_if_present(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    // Linux gives the file the mode that the socket has when it is bound, so it is never open to others,
    // and the umask, which belongs to all threads, stays as it is.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::{fs::PermissionsExt, net::UnixStream};

    use super::*;

    #[test]
    fn makes_its_directory_and_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/smtplb/admin.sock");
        let _listener = bind(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_stale_socket_does_not_hinder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        drop(bind(&path).unwrap());
        assert!(UnixStream::connect(&path).is_err());
        let _listener = bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_successor_takes_over_from_a_living_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        let older = bind(&path).unwrap();
        let newer = bind(&path).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        assert_eq!(
            older.accept().unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        newer.accept().unwrap();
    }

    #[test]
    fn who_gives_up_its_place_leaves_it_to_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        let older = bind(&path).unwrap();
        let (_newer, place) = listen_aside(&path).unwrap();
        drop(place);
        let _client = UnixStream::connect(&path).unwrap();
        older.accept().unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes.txt");
        fs::write(&path, "keep").unwrap();
        assert_eq!(
            bind(&path).unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
        assert_eq!(fs::read_to_string(&path).unwrap(), "keep");
    }

    #[test]
    fn a_path_too_long_is_an_error_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert!(bind(&dir.path().join("x".repeat(120))).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
