//! The kernel plane from the daemon's side: loading, attaching, filling the tables, reading them.

mod addresses;
mod announce;
mod apply;
mod beside;
mod bpffs;
mod clsact;
mod ends;
mod explain;
mod flows;
mod forwarding;
mod jumps;
mod links;
mod loader;
mod own_members;
mod pairs;
mod policies;
mod ports;
mod probe;
mod readings;
mod replies;
mod reset;
mod routes;
mod services;
mod support;
mod sys;
mod tables;
mod trial;
mod trunks;
mod unmarked;
mod views;

use std::{
    collections::BTreeSet,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    net::SocketAddr,
    os::fd::AsRawFd,
    path::Path,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use anyhow::{Context, Result};
use aya::{
    Ebpf,
    maps::{MapData, PerCpuArray, SockMap},
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use lb_common::{
    event::Cause,
    layout::{ENDS, MAX_WORKERS, SWEEP},
    stats::TrafficCell,
};

pub use self::{
    addresses::{Addresses, Present, address_conflicts},
    apply::Built,
    ends::FlowEnds,
    explain::{Found, Question, has_interface},
    flows::{FlowSnapshot, FlowTable},
    links::check_interfaces,
    loader::OBJECT,
    pairs::PairUsage,
    policies::RuleCount,
    probe::{Feature, features},
    sys::event,
    tables::{Held, Numbers},
};
use self::{
    beside::Beside, bpffs::PinDirectory, jumps::Jumps, links::Hook, policies::PolicyTables,
    tables::Tables,
};
use crate::{
    admin::view::{AttachmentView, DegradedView},
    model::{Generation, Name},
};

/// Flow records where no virtual server needs them.
pub const FEW_FLOWS: u32 = 0;
/// A full sweep takes this many calls of [`KernelPlane::sweep`].
const SWEEP_CALLS: u64 = 8;

/// The kernel plane, loaded.
pub struct KernelPlane {
    ebpf: Ebpf,
    pins: Arc<PinDirectory>,
    tables: Tables,
    policies: PolicyTables,
    jumps: Jumps,
    listeners: SockMap<MapData>,
    lost: PerCpuArray<MapData, u64>,
    /// What other layouts still carry.
    beside: Beside,
    /// Opened when a flow has to be ended.
    resets: Option<reset::Sender>,
    attachments: Vec<AttachmentView>,
    /// Pins of the links that the generation in use needs.
    links: Vec<String>,
    degraded: Vec<DegradedView>,
    adopted: bool,
    /// What [`Self::exhausted`] told last.
    exhausted: [u64; 2],
    /// Tells this daemon from every other.
    instance: u32,
}

/// Where an earlier daemon's programs are attached, for [`KernelPlane::restore`].
#[derive(Debug)]
pub struct Attached {
    links: BTreeSet<String>,
    /// Indices of the interfaces there.
    judged: BTreeSet<u32>,
}

impl KernelPlane {
    /// Loads programs and tables; nothing is attached, and no packet is touched yet.
    ///
    /// # Errors
    ///
    /// When the pins cannot be kept, or the kernel refuses something.
    pub fn load(bpffs: &Path, flows: u32, kernel_log: bool) -> Result<Self> {
        support::check()?;
        let pins = Arc::new(PinDirectory::open(bpffs)?);
        let fresh = pins.names().is_empty();
        let loaded = Self::load_pinned(pins.clone(), flows, kernel_log);
        if loaded.is_err() && fresh {
            // What made the load fail is the news, not what may go wrong here.
            let _ = pins.clear();
        }
        loaded
    }

    fn load_pinned(pins: Arc<PinDirectory>, flows: u32, kernel_log: bool) -> Result<Self> {
        if flows > FEW_FLOWS {
            loader::drop_small_tables(&pins)?;
        }
        let loader::Loaded { mut ebpf, adopted } = loader::load(&pins, flows, kernel_log)?;
        loader::sk_lookup(&mut ebpf, "steer_sessions")?;
        let tables = Tables::open(&mut ebpf)?;
        let policies = PolicyTables::open(&mut ebpf)?;
        let listeners = loader::map(&mut ebpf, "LISTENERS")?.try_into()?;
        let lost = loader::map(&mut ebpf, "FLOW_ENDS_LOST")?.try_into()?;
        let instance = RandomState::new().build_hasher().finish() as u32;
        let mut plane = Self {
            ebpf,
            pins,
            tables,
            policies,
            jumps: Jumps::new(instance),
            listeners,
            lost,
            beside: Beside::new(),
            resets: None,
            attachments: Vec::new(),
            links: Vec::new(),
            degraded: support::degraded(),
            adopted,
            exhausted: [0; 2],
            instance,
        };
        // What an earlier daemon has told of is no news.
        plane.exhausted();
        Ok(plane)
    }

    /// Were the tables of an earlier daemon taken over?
    pub fn adopted(&self) -> bool {
        self.adopted
    }

    /// Process id of the daemon that applied the generation in use, when that is another one.
    pub fn other_owner(&self) -> Option<u32> {
        let config = self.tables.config()?;
        (config.instance != self.instance).then_some(config.owner)
    }

    /// Is the generation in use this daemon's? Not when one of another layout has come after it, either.
    pub fn is_owner(&self) -> bool {
        let config = self.tables.config();
        config.is_some_and(|config| config.instance == self.instance)
            && !self.pins.has_successor(links::STEERING)
    }

    /// Is there the work of an smtplb of another layout?
    pub fn has_others(&self) -> bool {
        !self.pins.others().is_empty()
    }

    /// Number of the generation in use; 0 before the first.
    pub fn generation(&self) -> u32 {
        self.tables.config().map_or(0, |config| config.generation)
    }

    /// Finds the numbers of a generation's members and virtual servers.
    ///
    /// # Errors
    ///
    /// When there are too many.
    pub fn number(&self, generation: &Generation) -> Result<Numbers> {
        self.number_beside(generation, &Held::default())
    }

    /// As [`Self::number`], and nobody new gets one that is `held`.
    ///
    /// # Errors
    ///
    /// When there are too many.
    pub fn number_beside(&self, generation: &Generation, held: &Held) -> Result<Numbers> {
        self.tables.number(generation, held)
    }

    /// The last state that the tables know of a member.
    pub fn available(&self, number: u16) -> Option<bool> {
        self.tables.available(number)
    }

    /// Counters of a member.
    pub fn member_cell(&self, number: u16) -> &'static TrafficCell {
        &self.tables.member_cells[usize::from(number)]
    }

    /// Counters of a virtual server.
    pub fn service_cell(&self, number: u16) -> &'static TrafficCell {
        &self.tables.service_cells[usize::from(number)]
    }

    /// Attaches the packet programs, or swaps them in place.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn attach(&mut self, generation: &Generation) -> Result<()> {
        (self.attachments, self.links) = links::attach(
            &mut self.ebpf,
            &self.pins,
            &mut self.jumps,
            &generation.network,
        )?;
        let judged = self
            .attachments
            .iter()
            .map(|place| place.interface.as_str());
        self.policies.set_judged(judged)
    }

    /// Where programs are attached now.
    pub fn attached(&self) -> Attached {
        Attached {
            links: links::pinned(&self.pins),
            judged: self.policies.judged(),
        }
    }

    /// After a start that failed beside an earlier daemon: programs are attached where they were before
    /// [`Self::attach`].
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn restore(&mut self, before: &Attached, generation: &Generation) -> Result<()> {
        let mut kept = generation.network.clone();
        for names in [&mut kept.client_interfaces, &mut kept.server_interfaces] {
            names.retain(|name| {
                policies::interface_index(name).is_some_and(|index| before.judged.contains(&index))
            });
        }
        links::detach_filters(&generation.network, Some(&kept));
        self.policies.restore_judged(&before.judged)?;
        links::restore(&mut self.ebpf, &self.pins, &mut self.jumps, &before.links)
    }

    /// Removes packet programs from interfaces that `old` names and the last [`Self::attach`] did not.
    ///
    /// # Errors
    ///
    /// When a pin cannot be removed.
    pub fn detach_others(&self, old: &Generation, new: &Generation) -> Result<()> {
        links::detach_filters(&old.network, Some(&new.network));
        links::detach_others(&self.pins, &self.links)?;
        self.jumps.unpin_others(&self.pins)
    }

    /// Makes the tables for passthrough flows where there were none yet. What else is there is taken over: programs,
    /// counters, the generation in use.
    ///
    /// # Errors
    ///
    /// When the kernel refuses something; then everything is as before.
    pub fn grow(&mut self, flows: u32, kernel_log: bool) -> Result<()> {
        if self.flows_max() > u64::from(FEW_FLOWS) {
            return Ok(());
        }
        let mut next = Self::load_pinned(self.pins.clone(), flows, kernel_log)?;
        // The jump tables keep the number of their own load: pins of the one before have another name.
        next.instance = self.instance;
        next.adopted = self.adopted;
        next.exhausted = self.exhausted;
        next.policies.take_over(&mut self.policies);
        *self = next;
        Ok(())
    }

    /// Attaches the TC program the way of kernels before 6.6, whatever this one can do.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn attach_clsact(&mut self, generation: &Generation) -> Result<()> {
        let network = &generation.network;
        self.jumps.ready(&mut self.ebpf, Hook::Tc)?;
        let program = loader::classifier(&mut self.ebpf, "balance_tc")?;
        for interface in network
            .client_interfaces
            .iter()
            .chain(&network.server_interfaces)
        {
            clsact::attach(program, interface)?;
        }
        Ok(())
    }

    /// Removes what [`Self::attach_clsact`] has attached.
    pub fn detach_clsact(&self, generation: &Generation) {
        clsact::detach(&generation.network);
    }

    /// Removes packet programs that an earlier generation needed and this one does not.
    ///
    /// # Errors
    ///
    /// When a pin cannot be removed.
    pub fn detach_packets(&mut self, generation: &Generation) -> Result<()> {
        links::detach_filters(&generation.network, None);
        self.attachments.clear();
        self.policies.set_judged(std::iter::empty())?;
        self.links.clear();
        links::detach_others(&self.pins, &self.links)?;
        Jumps::new(self.instance).unpin_others(&self.pins)
    }

    /// Puts the proxy's listeners into the steering table, over those of an earlier process, and attaches the steering
    /// program. `listeners` are IPv4 and IPv6 of each worker in turn.
    ///
    /// # Errors
    ///
    /// When the kernel refuses a listener or the program.
    pub fn steer<V4: AsRawFd, V6: AsRawFd>(
        &mut self,
        listeners: &[(V4, Option<V6>)],
    ) -> Result<()> {
        // Two programs may be attached for a moment: both read the same tables.
        let steering = links::attach_steering(&mut self.ebpf)?;
        for (slot, (v4, v6)) in (0u32..MAX_WORKERS).zip(listeners) {
            self.listeners
                .set(slot, v4, 0)
                .context("cannot put a listener into the steering table")?;
            if let Some(v6) = v6 {
                self.listeners.set(MAX_WORKERS + slot, v6, 0)?;
            }
        }
        links::pin_steering(steering, &self.pins)
    }

    /// Tells the programs what a monitor found.
    ///
    /// # Errors
    ///
    /// When the table refuses the record.
    pub fn set_member(
        &mut self,
        number: u16,
        pool: &Name,
        address: SocketAddr,
        up: bool,
    ) -> Result<()> {
        self.tables.write_member(number, pool, address, up)?;
        self.tables.refresh_automap(address)
    }

    /// Lets go of what an older smtplb has left in another layout, once it carries nothing.
    pub fn tend_others(&mut self) {
        self.beside.tend(&self.pins);
    }

    /// Releases expired flows in the next eighth of the table. Packets wait for nothing meanwhile.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to run the program.
    pub fn sweep(&mut self) -> Result<()> {
        let used = self.tables.flows_max();
        let program: &mut SchedClassifier = loader::classifier(&mut self.ebpf, "sweep_flows")?;
        let packet = [0u8; 64];
        let options = TestRunOptions {
            data_in: Some(&packet),
            repeat: used.div_ceil(u64::from(SWEEP) * SWEEP_CALLS).max(1) as u32,
            ..TestRunOptions::new()
        };
        program
            .test_run(options)
            .context("cannot run the sweep program")?;
        Ok(())
    }

    /// Where the packet programs are attached, and why there.
    pub fn attachments(&self) -> &[AttachmentView] {
        &self.attachments
    }

    /// Every flow, for tables that hold few.
    pub fn flows(&self) -> Vec<FlowSnapshot> {
        self.flow_table().all().collect()
    }

    /// The flow records, to be read without holding the plane.
    pub fn flow_table(&self) -> FlowTable {
        self.tables.flow_table()
    }

    /// Ends flows of a member, at most [`ENDS`] of them: their records are free at once, and both peers get a reset with
    /// the sequence number they expect. How many were ended; one that has ended by itself meanwhile is left alone.
    ///
    /// A peer that has more data on its way does not believe the reset (RFC 5961 §3); its next packet belongs to no flow,
    /// and the stack answers it with a reset that it believes.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to run the program.
    pub fn end_flows(
        &mut self,
        member: u16,
        flows: &[FlowSnapshot],
        cause: Cause,
    ) -> Result<usize> {
        let ended = self.release_flows(member, flows, cause)?;
        let sender = self.resets.get_or_insert_with(reset::Sender::open);
        for flow in &ended {
            sender.send(&reset::to_client(flow));
            for reset in reset::to_member(flow) {
                sender.send(&reset);
            }
        }
        Ok(ended.len())
    }

    /// Frees the records of flows of a member, at most [`ENDS`] of them, and tells nobody. Which ones it has ended; the
    /// others had ended by themselves, and their records may be other flows' now.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to run the program.
    pub fn release_flows(
        &mut self,
        member: u16,
        flows: &[FlowSnapshot],
        cause: Cause,
    ) -> Result<Vec<FlowSnapshot>> {
        let mut packet = Vec::with_capacity(4 * (3 + 2 * ENDS as usize));
        for word in [cause as u32, u32::from(member), flows.len() as u32] {
            packet.extend_from_slice(&word.to_ne_bytes());
        }
        for flow in flows {
            packet.extend_from_slice(&flow.slot.to_ne_bytes());
            packet.extend_from_slice(&flow.created.to_ne_bytes());
        }
        // The kernel wants an Ethernet header at least.
        packet.resize(packet.len().max(64), 0);
        let program: &mut SchedClassifier = loader::classifier(&mut self.ebpf, "end_flows")?;
        let mut answer = vec![0; packet.len()];
        let options = TestRunOptions {
            data_in: Some(&packet),
            data_out: Some(&mut answer),
            ..TestRunOptions::new()
        };
        program
            .test_run(options)
            .context("cannot run the program that ends flows")?;
        let answers = answer.chunks_exact(4).skip(3).step_by(2);
        let ended = flows
            .iter()
            .zip(answers)
            .filter(|(_, word)| *word == 1u32.to_ne_bytes());
        Ok(ended.map(|(flow, _)| *flow).collect())
    }

    /// What this kernel or our privileges do not allow, and what follows from it.
    pub fn degraded(&self) -> Vec<DegradedView> {
        let mut degraded = [&self.degraded, self.jumps.left_out()].concat();
        if !reset::may_send() || !announce::may_announce() {
            degraded.push(DegradedView {
                lacks: "cap-net-raw".to_owned(),
                why: "connections of a member that is ended are reset when their peers speak next, and neighbours are \
                      not told of new addresses"
                    .to_owned(),
            });
        }
        degraded
    }

    /// The programs' log lines, as they are written (`run --kernel-log`).
    ///
    /// # Errors
    ///
    /// When the object was loaded without them.
    pub fn log_lines(&mut self) -> Result<aya_log::EbpfLogger<&'static dyn log::Log>> {
        Ok(aya_log::EbpfLogger::init(&mut self.ebpf)?)
    }

    /// No proxy session lives: gauges that a killed daemon left behind start anew.
    pub fn forget_sessions(&self) {
        for cell in self
            .tables
            .member_cells
            .iter()
            .chain(self.tables.service_cells)
        {
            cell.sessions_active.store(0, Relaxed);
        }
    }

    /// What takes the plane down, also after the plane itself was lost in a failed start.
    pub fn remover(&self) -> Remover {
        Remover {
            pins: self.pins.clone(),
        }
    }
}

/// Takes the kernel plane down.
#[derive(Debug, Clone)]
pub struct Remover {
    pins: Arc<PinDirectory>,
}

impl Remover {
    /// Removes programs, pins and tables, also those of the layouts that were there before.
    ///
    /// # Errors
    ///
    /// When a pin cannot be removed.
    pub fn remove(&self, generation: &Generation) -> Result<()> {
        links::detach_filters(&generation.network, None);
        let earlier = self.pins.clear_earlier();
        self.remove_own()?;
        earlier.context("cannot remove the pins of another layout")
    }

    /// Removes the pins of this layout alone: what another one carries goes on.
    ///
    /// # Errors
    ///
    /// When a pin cannot be removed.
    pub fn remove_own(&self) -> Result<()> {
        self.pins.clear().context("cannot remove the pins")
    }
}
