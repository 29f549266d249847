//! A raw end of a link: sends and receives whole frames, past every stack.
#![expect(unsafe_code, reason = "packet sockets and their control messages")]

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use anyhow::{Context, Result, ensure};

/// Room for what arrives between two looks, bytes.
const ROOM: libc::c_int = 64 << 20;
/// `PACKET_IGNORE_OUTGOING`, linux/if_packet.h (Linux 4.20).
const IGNORE_OUTGOING: libc::c_int = 23;
/// `TP_STATUS_VLAN_VALID` and `TP_STATUS_VLAN_TPID_VALID`, linux/if_packet.h.
const VLAN: u32 = 1 << 4;
const VLAN_KIND: u32 = 1 << 6;
/// `struct tpacket_auxdata`: status, len, snaplen, mac, net, vlan_tci, vlan_tpid.
const AUXILIARY: usize = 20;

/// An open port. Frames larger than a jumbo frame are cut.
#[derive(Debug)]
pub struct Port {
    socket: OwnedFd,
    room: Vec<u8>,
}

impl Port {
    /// Opens the interface of the namespace this thread is in.
    ///
    /// # Errors
    /// When there is no such interface, or this is not root.
    pub fn open(interface: &str) -> Result<Self> {
        let name = std::ffi::CString::new(interface)?;
        // SAFETY: a name that ends with NUL.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        ensure!(index != 0, "there is no interface {interface}");
        let every = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: plain numbers.
        let socket = unsafe {
            libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
                0,
            )
        };
        checked(socket as isize).context("a packet socket")?;
        // SAFETY: a new descriptor that nobody else holds.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        for (level, option, value) in [
            (libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, ROOM),
            (libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, ROOM),
            (libc::SOL_PACKET, libc::PACKET_AUXDATA, 1),
            (libc::SOL_PACKET, IGNORE_OUTGOING, 1),
        ] {
            // SAFETY: the value is an int, and so long.
            let set = unsafe {
                libc::setsockopt(
                    socket.as_raw_fd(),
                    level,
                    option,
                    (&raw const value).cast(),
                    size_of::<libc::c_int>() as u32,
                )
            };
            checked(set as isize).with_context(|| format!("packet socket option {option}"))?;
        }
        // SAFETY: all zeros are an address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = every;
        address.sll_ifindex = index as i32;
        // SAFETY: the address is a complete `sockaddr_ll`.
        let bound = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as u32,
            )
        };
        checked(bound as isize).with_context(|| format!("cannot bind to {interface}"))?;
        Ok(Self {
            socket,
            room: vec![0; 1 << 16],
        })
    }

    /// Puts a frame on the link.
    ///
    /// # Errors
    /// When the link does not take it: it is down, or the frame too large.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        // SAFETY: the frame is as long as we say.
        let sent = unsafe {
            libc::send(
                self.socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
            )
        };
        checked(sent).with_context(|| format!("cannot send a frame of {} bytes", frame.len()))?;
        Ok(())
    }

    /// The next frame that has arrived, with its VLAN tag where the wire has it; `None` when there is none yet.
    ///
    /// # Errors
    /// When the link is gone.
    pub fn receive(&mut self) -> Result<Option<Vec<u8>>> {
        let mut control = [0u64; 16];
        let mut vector = libc::iovec {
            iov_base: self.room.as_mut_ptr().cast(),
            iov_len: self.room.len(),
        };
        // SAFETY: all zeros are a message header.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &raw mut vector;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        // SAFETY: the vector and the control room are as long as the header says.
        let length = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &raw mut message, 0) };
        if length < 0 && io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock {
            return Ok(None);
        }
        let length = checked(length).context("cannot receive")?;
        let mut frame = self.room[..length].to_vec();
        if let Some(tag) = tag(&message)
            && frame.len() >= 14
        {
            frame.splice(12..12, tag);
        }
        Ok(Some(frame))
    }
}

/// The VLAN tag that the kernel took out of the bytes.
fn tag(message: &libc::msghdr) -> Option<[u8; 4]> {
    // SAFETY: the kernel filled the header, and its control room is still there.
    let first = unsafe { libc::CMSG_FIRSTHDR(message).as_ref() }?;
    if first.cmsg_level != libc::SOL_PACKET || first.cmsg_type != libc::PACKET_AUXDATA {
        return None;
    }
    let mut auxiliary = [0u8; AUXILIARY];
    // SAFETY: a message of this type holds that many bytes.
    unsafe {
        std::ptr::copy_nonoverlapping(
            libc::CMSG_DATA(first),
            auxiliary.as_mut_ptr(),
            auxiliary.len(),
        );
    };
    let status = u32::from_ne_bytes(auxiliary[..4].try_into().ok()?);
    if status & VLAN == 0 {
        return None;
    }
    let half = |at: usize| u16::from_ne_bytes([auxiliary[at], auxiliary[at + 1]]);
    let kind = if status & VLAN_KIND != 0 {
        half(18)
    } else {
        0x8100
    };
    let ([a, b], [c, d]) = (kind.to_be_bytes(), half(16).to_be_bytes());
    Some([a, b, c, d])
}

fn checked(answer: isize) -> io::Result<usize> {
    usize::try_from(answer).map_err(|_| io::Error::last_os_error())
}
