//! Writes the flow log: takes ended flows out of the ring buffer and says them at a bounded rate.

use std::{
    collections::HashMap,
    fs::{self, File},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use lb_common::{
    event::{Cause, FlowEnd as Record},
    flow::{owners, split_owners},
    tcp,
};
use rustix::fs::{FlockOperation, flock};

use super::running::{Running, Shared};
use crate::{
    dataplane::{FlowEnds, FlowSnapshot},
    telemetry::flow::{FlowEnd, Rate},
};

/// Between two looks at the ring buffer, which holds what a storm makes in that time.
pub(super) const PERIOD: Duration = Duration::from_millis(100);
/// Ends taken out in one look, so that the main task is not held up.
const PORTION: usize = 16 * 1024;
/// Below the state directory: who holds it reads.
const LOCK: &str = "flow-log.lock";

/// The reader. Of two daemons side by side only one reads: two would garble each other's place in the ring buffer.
pub(super) struct FlowLog {
    lock: PathBuf,
    open: Option<(FlowEnds, Option<File>)>,
    failed: bool,
    rate: Rate,
    lost: Option<u64>,
    started: Instant,
}

impl FlowLog {
    /// Does not read yet.
    pub(super) fn new(state: &Path) -> Self {
        Self {
            lock: state.join(LOCK),
            open: None,
            failed: false,
            rate: Rate::new(0),
            lost: None,
            started: Instant::now(),
        }
    }

    /// Another daemon reads from now on.
    pub(super) fn give_up(&mut self) {
        self.open = None;
        self.failed = true;
    }

    /// Takes out what is there and logs it.
    pub(super) fn read(&mut self, shared: &Shared) {
        if !self.is_open(shared) {
            return;
        }
        let Some((ends, _)) = &mut self.open else {
            return;
        };
        let running = shared.running();
        let log = running.generation.log;
        self.rate.set(log.flows_per_second);
        let second = self.started.elapsed().as_secs() + 1;
        let suppressed = self.rate.suppressed_before(second);
        if suppressed > 0 {
            log::warn!(
                "{suppressed} ended flows were not logged: more than flows_per_second = {}",
                log.flows_per_second
            );
        }
        let mut names = None;
        for _ in 0..PORTION {
            let Some(record) = ends.take() else {
                break;
            };
            // Taken out all the same: what is switched on later begins then.
            if log.flows && self.rate.take(second) {
                let names = names.get_or_insert_with(|| Names::of(&running));
                shared.lines.say(names.end(&record));
            }
        }
        self.tell_lost(shared);
    }

    /// The kernel plane is about to be taken down: the flows that are left end with it.
    pub(super) fn read_last(&mut self, shared: &Shared) {
        self.read(shared);
        let running = shared.running();
        if !running.generation.log.flows || self.open.is_none() {
            return;
        }
        let table = shared.plane().flow_table();
        let names = Names::of(&running);
        let most = running.generation.log.flows_per_second as usize;
        for flow in table.all().take(most) {
            shared.lines.say(names.last(&flow));
        }
        let left = table.all().skip(most).count();
        if left > 0 {
            log::warn!("{left} flows that end with the kernel plane were not logged");
        }
    }

    fn tell_lost(&mut self, shared: &Shared) {
        let lost = shared.plane().flow_ends_lost();
        let before = self.lost.replace(lost).unwrap_or(lost);
        if lost > before {
            log::warn!(
                "{} ended flows were not logged: they came faster than they could be read",
                lost - before
            );
        }
    }

    /// Opens the ring buffer as soon as nobody else reads it.
    fn is_open(&mut self, shared: &Shared) -> bool {
        if self.open.is_some() || self.failed {
            return self.open.is_some();
        }
        let folder = self.lock.parent().map_or(Ok(()), fs::create_dir_all);
        let file = folder.and_then(|()| File::create(&self.lock)).ok();
        if let Some(file) = &file
            && flock(file, FlockOperation::NonBlockingLockExclusive).is_err()
        {
            return false;
        }
        let opened = shared.plane().flow_ends();
        match opened {
            Ok(ends) => self.open = Some((ends, file)),
            Err(error) => {
                self.failed = true;
                log::error!("no flow log: {error:#}");
            }
        }
        self.open.is_some()
    }
}

/// Names of a generation's objects, by their numbers in the tables.
struct Names {
    virtual_servers: HashMap<u16, String>,
    members: HashMap<u16, String>,
}

impl Names {
    fn of(running: &Running) -> Self {
        let servers = running.numbers.virtual_servers.iter();
        let members = running.members();
        Self {
            virtual_servers: servers
                .map(|(name, number)| (*number, name.to_string()))
                .collect(),
            members: members
                .map(|(_, member)| (member.id, member.name.to_string()))
                .collect(),
        }
    }

    fn last(&self, flow: &FlowSnapshot) -> FlowEnd {
        let record = Record {
            bytes: flow.bytes,
            route: flow.route,
            packets: flow.packets.map(|count| count as u32),
            owners: owners(flow.member, flow.virtual_server),
            created: flow.created,
            last_seen: flow.last_seen,
            ended: flow.last_seen,
            phase: flow.phase as u8,
            cause: match flow.phase.ended() {
                true => Cause::Expired,
                false => Cause::Stopped,
            } as u8,
            reset_by: flow.reset_by as u8,
            reserved: [0; 5],
        };
        self.end(&record)
    }

    fn end(&self, record: &Record) -> FlowEnd {
        let (member, virtual_server) = split_owners(record.owners);
        let socket = |(address, port): (lb_common::addr::Addr, u16)| address.to_socket_addr(port);
        let ticks = record.last_seen.saturating_sub(record.created);
        FlowEnd {
            virtual_server: self
                .virtual_servers
                .get(&virtual_server)
                .cloned()
                .unwrap_or_else(|| format!("#{virtual_server}")),
            client: socket(record.route.client()),
            address: socket(record.route.address()),
            member: self
                .members
                .get(&member)
                .cloned()
                .unwrap_or_else(|| "-".to_owned()),
            member_address: socket(record.route.member()),
            snat: socket(record.route.snat()),
            bytes: record.bytes,
            packets: record.packets,
            duration: Duration::from_nanos(u64::from(ticks) << tcp::TICK_SHIFT),
            phase: tcp::Phase::from_u32(u32::from(record.phase)).word(),
            reason: record.reason(),
        }
    }
}
