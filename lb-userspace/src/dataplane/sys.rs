//! The one place with unsafe code: arrays of the kernel mapped into memory, and plain records as map values.
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
    event::FlowEnd,
    flow::{Flow, FlowKey, Route},
    member::Member,
    service::{Config, Pool, PrefixKey, Service, ServiceKey},
    stats::TrafficCell,
};
use rustix::mm::{MapFlags, ProtFlags, mmap};

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
    FlowKey,
    Member,
    Pool,
    PrefixKey,
    Service,
    ServiceKey,
    Policy,
    Rule,
    Guard,
    RuleCell,
    Budget,
    PlaceKey,
    Explanation
);

/// Where new flow records come from; the programs' view is in `lb-ebpf`.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Allocation {
    /// The highest slot that was ever used.
    pub unused: lb_common::atomic::AtomicU32,
    rest: [u32; 3],
}

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
// SAFETY: an atomic, and words nobody reads.
unsafe impl Shared for Allocation {}

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
