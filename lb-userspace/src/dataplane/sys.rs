//! The one place with unsafe code: arrays of the kernel mapped into memory, plain records as map values, addresses on a
//! link.
#![expect(
    unsafe_code,
    reason = "shared memory with the kernel; each block states its condition"
)]

use std::{
    io,
    os::fd::AsFd,
    ptr::{NonNull, null_mut},
};

use aya::maps::{MapData, MapInfo};
use lb_common::{
    access::{Budget, Event, Explanation, Guard, PlaceKey, Policy, Rule, RuleCell},
    addr::Addr,
    event::FlowEnd,
    flow::{Flow, Route},
    index::{Bucket, ServiceBucket},
    member::Member,
    pair::{Allocation, Chunk, Mark, PLACES, Pair, PortSet, Source},
    service::{Config, Pool, PrefixKey, Service},
    stats::TrafficCell,
};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use socket2::{SockAddr, SockAddrStorage};

/// A record that a map holds as it is.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record<T: Copy>(pub T);

macro_rules! records {
    ($($t:ty),*) => { $(
        // SAFETY: declared with `map_record!`: `repr(C)`, integers only, no padding, so any bytes are a value.
        unsafe impl aya::Pod for Record<$t> {}
    )* };
}
records!(
    Config,
    Member,
    Pool,
    PrefixKey,
    Service,
    ServiceBucket,
    Source,
    Policy,
    Rule,
    Guard,
    RuleCell,
    Budget,
    PlaceKey,
    Explanation
);

/// A type whose values in shared memory may be looked at while the kernel writes them.
///
/// # Safety
///
/// Any bytes are a value, and everything that changes is atomic.
pub(super) unsafe trait Shared: Sync + 'static {}

// SAFETY: atomics and unused words.
unsafe impl Shared for TrafficCell {}
// SAFETY: atomics, and a route that is read by `route` only.
unsafe impl Shared for Flow {}
// SAFETY: atomics, and words nobody reads.
unsafe impl Shared for Allocation {}
// SAFETY: atomics, and ends that are read by `identity` only.
unsafe impl Shared for Pair {}
// SAFETY: atomics, and a word nobody reads.
unsafe impl Shared for Chunk {}
// SAFETY: atomics.
unsafe impl Shared for Bucket {}
// SAFETY: atomics.
unsafe impl Shared for PortSet {}

// SAFETY: atomics.
unsafe impl Shared for BoundCell {}

/// A [`lb_common::access::Bound`] as words that may be written while the kernel reads others.
#[repr(transparent)]
#[derive(Debug)]
pub(super) struct BoundCell(pub [lb_common::atomic::AtomicU64; 4]);

/// Two words side by side, as they lie in memory.
pub(super) fn two_words(first: u32, second: u32) -> u64 {
    let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

/// The event in an entry of the ring; `None` when the entry is none of ours.
pub fn event(bytes: &[u8]) -> Option<Event> {
    if bytes.len() < size_of::<Event>() {
        return None;
    }
    // SAFETY: long enough, and declared with `map_record!`: any bytes are a value.
    Some(unsafe { bytes.as_ptr().cast::<Event>().read_unaligned() })
}

/// Maps an array of the kernel into memory, for the life of the process: a handful of arrays, each mapped once.
///
/// # Errors
///
/// When the record size differs, the map was not made for it (Linux before 5.5), or memory is short.
pub(super) fn map_array<T: Shared>(map: &MapData) -> io::Result<&'static [T]> {
    let info: MapInfo = map.info().map_err(io::Error::other)?;
    let count = info.max_entries() as usize;
    if info.value_size() as usize != size_of::<T>() {
        return Err(io::Error::other(format!(
            "records of {} bytes, expected {}",
            info.value_size(),
            size_of::<T>()
        )));
    }
    // SAFETY: a fresh mapping that overlaps nothing of ours.
    let pointer = unsafe {
        mmap(
            null_mut(),
            count * size_of::<T>(),
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED,
            map.fd().as_fd(),
            0,
        )
    }?;
    let pointer =
        NonNull::new(pointer.cast::<T>()).ok_or_else(|| io::Error::other("mapped at zero"))?;
    // SAFETY: the kernel mapped `count` records of this size, page-aligned; the mapping is never removed; `Shared`
    // promises that concurrent writes are harmless.
    Ok(unsafe { std::slice::from_raw_parts(pointer.as_ptr(), count) })
}

/// A record of the ring buffer; `None` when it has another size.
pub(super) fn flow_end(bytes: &[u8]) -> Option<FlowEnd> {
    // SAFETY: the size is checked, any bytes are a value, and an unaligned read asks for no alignment.
    (bytes.len() == size_of::<FlowEnd>())
        .then(|| unsafe { bytes.as_ptr().cast::<FlowEnd>().read_unaligned() })
}

/// The ends of a flow, copied while the kernel may be rewriting them: the caller checks the phase before and after.
pub(super) fn route(flow: &Flow) -> Route {
    // SAFETY: inside a live mapping; volatile, since the memory is shared with the kernel.
    unsafe { (&raw const flow.route).read_volatile() }
}

/// Where a packet socket sends to: a station on the link of an interface (packet(7)).
pub(super) fn link_address(index: u32, protocol: u16, station: [u8; 6]) -> SockAddr {
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: one of the platform's socket addresses; integers, so any bytes are a value.
    let address: &mut libc::sockaddr_ll = unsafe { storage.view_as() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = index.cast_signed();
    address.sll_halen = station.len() as u8;
    address.sll_addr[..station.len()].copy_from_slice(&station);
    // SAFETY: the storage holds an address of this family and length.
    unsafe { SockAddr::new(storage, size_of::<libc::sockaddr_ll>() as u32) }
}

/// Who a pair is, and whether it is in use.
pub(super) fn identity(pair: &Pair) -> ((Addr, Addr, u16), bool) {
    // SAFETY: inside a live mapping; volatile, since the memory is shared with the kernel.
    unsafe {
        (
            (
                (&raw const pair.source).read_volatile(),
                (&raw const pair.member).read_volatile(),
                (&raw const pair.port).read_volatile(),
            ),
            (&raw const pair.known).read_volatile() != 0,
        )
    }
}

/// A new pair: none of its places has a chunk yet.
pub(super) fn pair_image(
    (source, member, port): (Addr, Addr, u16),
    set: u32,
    ports: &[u64; PLACES],
) -> [u8; size_of::<Pair>()] {
    // SAFETY: integers and atomics of integers: all zeros are a value.
    let mut pair: Pair = unsafe { std::mem::zeroed() };
    (pair.source, pair.member, pair.port, pair.known) = (source, member, port, 1);
    *pair.ports.get_mut() = set;
    for (place, _) in ports.iter().enumerate().filter(|(_, word)| **word != 0) {
        *pair.words[Mark::Unbound as usize][place / 64].get_mut() |= 1 << (place % 64);
        *pair.tops[Mark::Unbound as usize].get_mut() |= 1 << (place / 64);
    }
    // SAFETY: of the same size, without padding: the record's size is the sum of its fields'.
    unsafe { std::mem::transmute(pair) }
}
