//! The one socket option that no library in use knows.
#![expect(
    unsafe_code,
    reason = "one call of setsockopt; its condition stands beside it"
)]

use std::{io, os::fd::AsRawFd};

/// `IP_BIND_ADDRESS_NO_PORT` (Linux 4.2), for both families: bind takes the address alone, and connect a port that is
/// free towards that peer.
pub(super) fn choose_port_late(socket: &impl AsRawFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: `on` lives through the call, and its size is the one given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
