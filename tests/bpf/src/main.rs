//! Programs that put packets in front of the packet programs.
//!
//! `replay_*` turn one packet of a test-run into the next of a list and hand it to the program in `NEXT_*` by a tail
//! call, so that a run of a million packets walks a million flows. `flood` sends first packets from ever new clients.
#![no_std]
#![no_main]
#![expect(
    unsafe_code,
    reason = "packet access, helper calls and exported symbols"
)]

use aya_ebpf::{
    bindings::xdp_action::XDP_ABORTED,
    helpers,
    macros::{classifier, map, xdp},
    maps::{Array, ProgramArray},
    programs::{TcContext, XdpContext},
};

/// What makes one packet another: bytes as on the wire. The daemon of the benchmark writes the same record.
#[repr(C)]
#[derive(Clone, Copy)]
struct Ends {
    src: u32,
    dst: u32,
    ports: u32,
    /// TCP flags in the lowest byte.
    flags: u32,
}

/// Where the list is.
#[repr(C)]
#[derive(Clone, Copy)]
struct Place {
    next: u32,
    /// Length of the list less one; a power of two less one.
    mask: u32,
    /// Always 0, which only the writer knows: makes each packet wait for what became of the one before, as a packet
    /// from a wire would, so that memory accesses of two packets do not overlap.
    zero: u32,
    /// IPv4 header checksum of the packet, as on the wire.
    check: u32,
}

/// How a flood goes on.
#[repr(C)]
#[derive(Clone, Copy)]
struct Flood {
    /// The interface it leaves by.
    interface: u32,
    /// Sent so far.
    sent: u32,
    /// The packet, as it is before anybody has changed it: the kernel uses the same memory again and again.
    packet: [u16; FLOODED / 2],
}

/// Bytes of a first packet.
const FLOODED: usize = 64;

/// Resized when it is loaded.
#[map]
static LIST: Array<Ends> = Array::with_max_entries(1, 0);
#[map]
static PLACE: Array<Place> = Array::with_max_entries(1, 0);
#[map]
static FLOOD: Array<Flood> = Array::with_max_entries(1, 0);
#[map]
static NEXT_TC: ProgramArray = ProgramArray::with_max_entries(1, 0);
#[map]
static NEXT_XDP: ProgramArray = ProgramArray::with_max_entries(1, 0);
#[map]
static NEXT_XDP_GENERIC: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// Ethernet, IPv4 without options, TCP without options.
const HEADERS: usize = 14 + 20 + 20;
const TTL: usize = 14 + 8;
const CHECK: usize = 14 + 10;
const SRC: usize = 14 + 12;
const DST: usize = 14 + 16;
const PORTS: usize = 14 + 20;
/// Header length and flags.
const FLAGS: usize = 14 + 20 + 12;
const SYN: u32 = 0x02;
/// The lower halves of sequence and acknowledgement number, of which the others are 0.
const SEQUENCE: usize = 14 + 20 + 6;
const ACKNOWLEDGEMENT: usize = 14 + 20 + 10;

#[classifier]
fn replay_tc(context: TcContext) -> i32 {
    if prepare(context.data(), context.data_end()) {
        // SAFETY: the program there is of the same kind; the map holds no other.
        let _ = unsafe { NEXT_TC.tail_call(&context, 0) };
    }
    i32::MAX
}

#[xdp(frags)]
fn replay_xdp(context: XdpContext) -> u32 {
    if prepare(context.data(), context.data_end()) {
        // SAFETY: as above.
        let _ = unsafe { NEXT_XDP.tail_call(&context, 0) };
    }
    XDP_ABORTED
}

#[xdp]
fn replay_xdp_generic(context: XdpContext) -> u32 {
    if prepare(context.data(), context.data_end()) {
        // SAFETY: as above.
        let _ = unsafe { NEXT_XDP_GENERIC.tail_call(&context, 0) };
    }
    XDP_ABORTED
}

/// Does nothing: what is left of a run's time is the replay's own.
#[classifier]
fn nothing_tc(_: TcContext) -> i32 {
    -1
}

#[xdp(frags)]
fn nothing_xdp(_: XdpContext) -> u32 {
    2
}

#[xdp]
fn nothing_xdp_generic(_: XdpContext) -> u32 {
    2
}

/// Sends a first packet from a client that has not been seen before: sources out of 198.18.0.0/15 (RFC 2544).
#[xdp]
fn flood(context: XdpContext) -> u32 {
    let (start, end) = (context.data(), context.data_end());
    let Some(state) = FLOOD.get_ptr_mut(0) else {
        return XDP_ABORTED;
    };
    if start + FLOODED > end {
        return XDP_ABORTED;
    }
    for place in 0..FLOODED / 2 {
        // SAFETY: inside the packet, checked above, and inside the record.
        unsafe { *((start + 2 * place) as *mut u16) = (&raw const (*state).packet[place]).read() };
    }
    // SAFETY: helper call without arguments; the record is written by this program alone, on one CPU.
    let (random, interface) = unsafe {
        (*state).sent += 1;
        (
            helpers::generated::bpf_get_prandom_u32(),
            (*state).interface,
        )
    };
    let source = 0xc612_0000 | (random & 0x0001_ffff);
    let port = 1024 | (random >> 16);
    // SAFETY: inside the packet, checked above.
    unsafe {
        let ports = (start + PORTS) as *mut u16;
        let (old_source, old_port) = (load_u32(start + SRC), u16::from_be(*ports));
        store_u32(start + SRC, source.to_be());
        *ports = (port as u16).to_be();
        let change = difference(u32::from_be(old_source), source);
        adjust(start + CHECK, change);
        adjust(
            start + 14 + 20 + 16,
            change + u64::from(!old_port) + u64::from(port as u16),
        );
        u32::try_from(helpers::generated::bpf_redirect(interface, 0)).unwrap_or(XDP_ABORTED)
    }
}

/// Makes the packet the next of the list; false when it is too short to.
#[inline(always)]
fn prepare(start: usize, end: usize) -> bool {
    let Some(place) = PLACE.get_ptr_mut(0) else {
        return false;
    };
    if start + HEADERS > end {
        return false;
    }
    // SAFETY: the record is written by this program alone, and a test-run has one CPU.
    let (next, place) = unsafe {
        (*place).next = (*place).next.wrapping_add(1);
        ((*place).next, &*place)
    };
    // SAFETY: inside the packet, checked above.
    let before = unsafe { load_u32(start + DST) ^ load_u32(start + SRC) ^ load_u32(start + PORTS) };
    let at = next.wrapping_add(before & place.zero) & place.mask;
    let Some(ends) = LIST.get(at) else {
        return false;
    };
    // In halves, as they are read: a processor waits for what is read in other pieces than it was written in just now,
    // and packets from a wire were not.
    // SAFETY: inside the packet, checked above.
    unsafe {
        *((start + TTL) as *mut u16) = u16::from_ne_bytes([64, 6]);
        *((start + CHECK) as *mut u16) = place.check as u16;
        store_u32(start + SRC, ends.src);
        store_u32(start + DST, ends.dst);
        store_u32(start + PORTS, ends.ports);
        *((start + FLAGS) as *mut u16) = u16::from_ne_bytes([0x50, ends.flags as u8]);
        // Both sides begin with 0 and have said nothing since.
        *((start + SEQUENCE) as *mut u16) = u16::from(ends.flags & SYN == 0).to_be();
        *((start + ACKNOWLEDGEMENT) as *mut u16) = 1u16.to_be();
    }
    true
}

/// Reads a word at an even place.
///
/// # Safety
///
/// Four bytes are there.
#[inline(always)]
unsafe fn load_u32(at: usize) -> u32 {
    // SAFETY: the caller has checked.
    unsafe { u32::from(*(at as *const u16)) | (u32::from(*((at + 2) as *const u16)) << 16) }
}

/// Writes a word at an even place.
///
/// # Safety
///
/// Four bytes are there.
#[inline(always)]
unsafe fn store_u32(at: usize, value: u32) {
    // SAFETY: the caller has checked.
    unsafe {
        *(at as *mut u16) = value as u16;
        *((at + 2) as *mut u16) = (value >> 16) as u16;
    }
}

/// What a checksum gains when a word changes (RFC 1624).
#[inline(always)]
fn difference(old: u32, new: u32) -> u64 {
    let old = !old;
    u64::from(old >> 16) + u64::from(old & 0xffff) + u64::from(new >> 16) + u64::from(new & 0xffff)
}

/// Adjusts a checksum by a change of what it covers.
///
/// # Safety
///
/// Two bytes are there.
#[inline(always)]
unsafe fn adjust(at: usize, change: u64) {
    let at = at as *mut u16;
    // SAFETY: the caller has checked.
    unsafe {
        let mut sum = u64::from(!u16::from_be(*at)) + change;
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        *at = (!(sum as u16)).to_be();
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
