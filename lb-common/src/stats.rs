//! Counters that both planes share.

#[cfg(not(target_arch = "bpf"))]
use core::sync::atomic::Ordering::Relaxed;

use crate::atomic::AtomicU64;

/// Counters of one member or one virtual server in a shared array: the kernel plane's line, then the proxy plane's.
///
/// Both planes count in the same memory, so least-connections and limits hold across them.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct TrafficCell {
    /// Passthrough flows now.
    pub flows_active: AtomicU64,
    /// Passthrough flows ever.
    pub flows_total: AtomicU64,
    /// Bytes of ended passthrough flows, towards the member.
    pub flow_bytes_in: AtomicU64,
    /// Bytes of ended passthrough flows, towards the clients.
    pub flow_bytes_out: AtomicU64,
    /// Packets of ended passthrough flows, towards the member.
    pub flow_packets_in: AtomicU64,
    /// Packets of ended passthrough flows, towards the clients.
    pub flow_packets_out: AtomicU64,
    reserved: [u64; 2],
    /// Proxy sessions now.
    pub sessions_active: AtomicU64,
    /// Proxy sessions ever.
    pub sessions_total: AtomicU64,
    /// Bytes of proxy sessions towards the member.
    pub session_bytes_in: AtomicU64,
    /// Bytes of proxy sessions towards the clients.
    pub session_bytes_out: AtomicU64,
    reserved2: [u64; 4],
}

const _: () = assert!(size_of::<TrafficCell>() == 128);

#[cfg(not(target_arch = "bpf"))]
impl TrafficCell {
    /// Flows and sessions now.
    pub fn active(&self) -> u64 {
        self.flows_active.load(Relaxed) + self.sessions_active.load(Relaxed)
    }

    /// Flows now.
    pub fn flows(&self) -> u64 {
        self.flows_active.load(Relaxed)
    }

    /// Sessions now.
    pub fn sessions(&self) -> u64 {
        self.sessions_active.load(Relaxed)
    }

    /// Flows and sessions ever.
    pub fn total(&self) -> u64 {
        self.flows_total.load(Relaxed) + self.sessions_total.load(Relaxed)
    }

    /// A proxy session took a place.
    pub fn session_started(&self) {
        self.sessions_active.fetch_add(1, Relaxed);
        self.sessions_total.fetch_add(1, Relaxed);
    }

    /// A proxy session gave its place back.
    pub fn session_ended(&self) {
        // A daemon that starts anew sets the gauge to zero while an older one may still end sessions.
        let _ = self
            .sessions_active
            .fetch_update(Relaxed, Relaxed, |active| active.checked_sub(1));
    }

    /// Bytes that a proxy session moved.
    pub fn count_session_bytes(&self, to_member: u64, to_client: u64) {
        self.session_bytes_in.fetch_add(to_member, Relaxed);
        self.session_bytes_out.fetch_add(to_client, Relaxed);
    }
}
