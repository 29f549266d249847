//! What the admin API says: the stable JSON contract of every read verb.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
};

use serde::{Deserialize, Serialize};

/// `smtplb status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Of the daemon, not of the command line that asks.
    pub version: String,
    /// Process id of the daemon.
    pub pid: u32,
    /// Number of the configuration in use.
    pub generation: u64,
    /// `mixed` or `passthrough-only`.
    pub mode: String,
    /// Seconds since the daemon started.
    pub uptime_s: u64,
    /// The kernel plane.
    pub kernel: KernelView,
    /// Proxy workers, one per core; 0 when no virtual server needs them.
    pub workers: u32,
    /// In the order of the file.
    pub virtual_servers: Vec<VirtualServerView>,
    /// By name.
    pub pools: Vec<PoolView>,
}

impl fmt::Display for DegradedView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.lacks, self.why)
    }
}

impl Status {
    /// Every member of every pool, pool after pool.
    pub fn into_members(self) -> Vec<MemberView> {
        self.pools
            .into_iter()
            .flat_map(|pool| pool.members)
            .collect()
    }
}

/// The kernel plane at a glance.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelView {
    /// One entry per interface that carries a packet program.
    pub attachments: Vec<AttachmentView>,
    /// Flows tracked now, half-open and closing ones included.
    pub flows: u64,
    /// Flows that fit.
    pub flows_max: u64,
    /// What this kernel or the privileges of the daemon do not allow, and what follows from it.
    #[serde(default)]
    pub degraded: Vec<DegradedView>,
}

/// A packet program on an interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachmentView {
    /// Its name.
    pub interface: String,
    /// `tcx`, `clsact`, `xdp` or `xdp-generic`.
    pub hook: String,
    /// Why this hook.
    pub why: String,
}

/// Something that is missing, and that the kernel plane does without; `docs/kernel-support.md` has the words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DegradedView {
    /// A stable word.
    pub lacks: String,
    /// What is lost with it, and the kernel that has it.
    pub why: String,
}

/// `smtplb show virtual-servers`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtualServerView {
    /// Its name.
    pub name: String,
    /// Address and port; a prefix and lists of ports as `203.0.113.0/24:25,587,1000-1010`.
    pub address: String,
    /// `passthrough` or `proxy`.
    pub forward: String,
    /// `none`, `implicit`, `starttls-require`, `starttls-allow`; absent on passthrough.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub client_tls: Option<String>,
    /// The pool that serves it.
    pub pool: String,
    /// `up` while a member of its pool is up, else `down`.
    pub state: String,
    /// What it carries.
    #[serde(flatten)]
    pub traffic: Traffic,
}

/// `smtplb show pools`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolView {
    /// Its name.
    pub name: String,
    /// `least-connections` or `round-robin`.
    pub method: String,
    /// The name of its monitor.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub monitor: Option<String>,
    /// In the order of the file.
    pub members: Vec<MemberView>,
}

/// `smtplb show members`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberView {
    /// Its pool.
    pub pool: String,
    /// Its name in the pool.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// `maint`, `down`, `drain`, `checking` until the first probe has ended, or `up`: the first that is true.
    pub state: String,
    /// Seconds since it came into this state; since the daemon's start where that is not known.
    #[serde(default)]
    pub state_s: u64,
    /// What the operator wants of it: `ready`, `drain` or `maint`.
    #[serde(default)]
    pub admin: String,
    /// Seconds until its connections are ended; absent when they go on.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub deadline_s: Option<u64>,
    /// What its monitor found last, in words; absent without a monitor.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
    /// Both planes together.
    #[serde(flatten)]
    pub traffic: Traffic,
    /// The kernel plane's part.
    pub kernel: Traffic,
    /// The proxy plane's part.
    pub proxy: Traffic,
}

/// `smtplb config show`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigView {
    /// Number of the configuration in use.
    pub generation: u64,
    /// It, as a file that loads to the same.
    pub text: String,
}

/// `smtplb show flows --count`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CountView {
    /// How many.
    pub count: u64,
}

/// `smtplb reload` and `smtplb config diff`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadView {
    /// Is the file in use now? Never after a dry run.
    pub applied: bool,
    /// Number of the configuration in use.
    pub generation: u64,
    /// What is different in the file.
    pub changes: Vec<ChangeView>,
    /// What is allowed, but hardly meant.
    pub warnings: Vec<String>,
}

/// One object that is different.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeView {
    /// `pool "msa"`, `network`, …
    pub object: String,
    /// `added`, `removed` or `changed`.
    pub change: String,
    /// Of a changed one, what: `port: 25 → 26`.
    pub details: Vec<String>,
}

/// Connections and bytes of an object.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Connections now.
    pub active: u64,
    /// Connections ever.
    pub total: u64,
    /// Bytes from clients.
    pub bytes_in: u64,
    /// Bytes to clients.
    pub bytes_out: u64,
    /// Packets from clients; the proxy plane counts none.
    pub packets_in: u64,
    /// Packets to clients; the proxy plane counts none.
    pub packets_out: u64,
}

/// `smtplb show flows`: one passthrough connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowView {
    /// The virtual server's name, or `#number` when the configuration no longer has it.
    pub virtual_server: String,
    /// The client.
    pub client: SocketAddr,
    /// The virtual address the client talks to.
    pub address: SocketAddr,
    /// The member.
    pub member: SocketAddr,
    /// What the member takes for the client.
    pub snat: SocketAddr,
    /// `syn`, `established`, `fin-client`, `fin-member`, `closing`, `reset`.
    pub phase: String,
    /// Seconds since its first packet.
    pub age_s: u64,
    /// Seconds since its last packet.
    pub idle_s: u64,
    /// Bytes (IP payload included, link header excluded) from the client.
    pub bytes_in: u64,
    /// Bytes to the client.
    pub bytes_out: u64,
    /// Packets from the client.
    pub packets_in: u64,
    /// Packets to the client.
    pub packets_out: u64,
}

/// `smtplb show sessions`: one proxy session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionView {
    /// Session id, as in the session log.
    pub id: String,
    /// The virtual server's name.
    pub virtual_server: String,
    /// The client.
    pub client: SocketAddr,
    /// The member, once one is chosen.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub member: Option<String>,
    /// Where the dialogue is.
    pub phase: String,
    /// Seconds since accept.
    pub age_s: u64,
}

/// `smtplb stats`: every counter, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Packets and connections that the kernel plane did not carry, by reason; see `docs/metrics.md`.
    pub drops: BTreeMap<String, u64>,
    /// What happened to sessions and in steering, by event; see `docs/metrics.md`.
    pub events: BTreeMap<String, u64>,
    /// By virtual server.
    pub virtual_servers: BTreeMap<String, Traffic>,
    /// By `pool/member`.
    pub members: BTreeMap<String, Traffic>,
    /// Flow records: half-open flows, and chunks of 64 records that belong to a SNAT address and member.
    #[serde(default)]
    pub flow_records: BTreeMap<String, u64>,
    /// By SNAT address and member.
    #[serde(default)]
    pub snat_ports: BTreeMap<String, PortsView>,
}

/// The ports of a SNAT address towards a member.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortsView {
    /// Carry a connection.
    pub used: u32,
    /// Carried one that has ended; given out when no other is left.
    pub resting: u32,
    /// Can carry one.
    pub usable: u32,
}

/// A certificate that is in use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateView {
    /// Its name in the configuration.
    pub name: String,
    /// What it is for.
    pub host_names: Vec<String>,
    /// The kind of its key.
    pub key: String,
    /// The SHA-256 of its public key, in base64, as `server_pins` has it.
    pub pin: String,
    /// Its last moment, RFC 3339.
    pub not_after: String,
    /// Whole days until then.
    pub days_left: i64,
    /// Where it was read from.
    pub chain: String,
    /// The virtual servers that show it, to clients or to members.
    pub used_by: Vec<String>,
    /// What is hardly meant about it.
    pub warnings: Vec<String>,
}

/// `smtplb show policy`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyView {
    /// Its name.
    pub name: String,
    /// Virtual servers that it guards, or `network`.
    pub enforced_by: Vec<String>,
    /// Virtual servers where it is only counted, or `network`.
    pub staged_by: Vec<String>,
    /// In order; the last is `default`.
    pub rules: Vec<RuleView>,
}

/// A rule of a policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleView {
    /// Its name, `default` for connections without one.
    pub name: String,
    /// One that is not never matches.
    pub enabled: bool,
    /// `accept`, `drop` or `reject`.
    pub action: String,
    /// Ranges of sources, overlapping ones put together.
    pub ranges: u64,
    /// On these only; empty for any.
    pub vlans: Vec<u16>,
    /// On these only; empty for any.
    pub interfaces: Vec<String>,
    /// Has its schedule its time now? True without one.
    pub in_time: bool,
    /// Are matches logged?
    pub log: bool,
    /// Connections it decided.
    pub hits: u64,
    /// Connections it would have decided, where its policy is staged.
    pub staged_hits: u64,
}

/// What `smtplb explain` asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The client.
    pub from: SocketAddr,
    /// Where it connects to.
    pub to: SocketAddr,
    /// Where it comes in; the first client interface unless named.
    pub interface: Option<String>,
    /// With this VLAN tag.
    pub vlan: Option<u16>,
}

/// `smtplb explain`: what would become of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExplanationView {
    /// The client.
    pub from: SocketAddr,
    /// Where it connects to.
    pub to: SocketAddr,
    /// Where it comes in.
    pub interface: String,
    /// With this VLAN tag.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub vlan: Option<u16>,
    /// `carried`, `refused` or `no-virtual-server`.
    pub verdict: String,
    /// The drop reason, when it is refused.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
    /// The virtual server.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub virtual_server: Option<String>,
    /// `passthrough` or `proxy`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub forward: Option<String>,
    /// Rules that match, in the order they are asked.
    pub rules: Vec<VerdictView>,
    /// The pool.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub pool: Option<String>,
    /// The member that would be chosen now, as `POOL/MEMBER`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub member: Option<String>,
    /// Its address.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub member_address: Option<SocketAddr>,
    /// The source address that the member would see; absent where it is the client's own, or no port is left.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub snat: Option<IpAddr>,
    /// The port it would have there.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub snat_port: Option<u16>,
    /// The phase of the flow that it belongs to: this client has it open already, and no rule is asked.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub flow: Option<String>,
}

/// What a policy says of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerdictView {
    /// The policy.
    pub policy: String,
    /// The rule that matches, `default` when none does.
    pub rule: String,
    /// `accept`, `drop` or `reject`.
    pub action: String,
    /// Only counted?
    pub staged: bool,
}
