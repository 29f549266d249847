//! Questions about policies; and a connection that nobody makes, through the programs that would meet it.

use std::{collections::HashMap, net::SocketAddr};

use anyhow::{Context as _, Result, bail};
use aya::maps::{Map, MapData, RingBuf};
use jiff::Timestamp;
use lb_common::{
    access::{Explanation, Spending},
    addr::Addr,
    reason::DropReason,
    tcp::Phase,
};

use super::{FlowTable, KernelPlane, RuleCount, policies::interface_index};
use crate::model::{Name, policy::Action};

/// Who asks to be let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The client.
    pub from: SocketAddr,
    /// Where it connects to.
    pub to: SocketAddr,
    /// The interface it comes in by.
    pub interface: String,
    /// With this VLAN tag.
    pub vlan: Option<u16>,
}

/// What would become of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Number of the virtual server; 0 for none.
    pub virtual_server: u16,
    /// Policy, rule and what it does, of the policies in force and of the staged ones.
    pub rules: [Option<(Name, Name, Action)>; 4],
    /// Why it would be refused.
    pub refused: Option<DropReason>,
    /// Number of the member; 0 for none.
    pub member: u16,
    /// What the member would take for the client, where it is another.
    pub snat: Option<SocketAddr>,
    /// The phase of the flow that it would belong to: the client has it open already, and no rule is asked.
    pub flow: Option<Phase>,
}

impl Found {
    /// The answer where the client has the very connection open. Looks at every record, and holds nobody up.
    pub fn open(table: FlowTable, question: &Question) -> Option<Self> {
        let socket = |(address, port): (Addr, u16)| address.to_socket_addr(port);
        let flow = table.all().find(|flow| {
            socket(flow.route.client()) == question.from
                && socket(flow.route.address()) == question.to
                && !flow.phase.ended()
        })?;
        Some(Self {
            virtual_server: flow.virtual_server,
            rules: [const { None }; 4],
            refused: None,
            member: flow.member,
            snat: Some(socket(flow.route.snat())),
            flow: Some(flow.phase),
        })
    }
}

/// Is there an interface of this name?
pub fn has_interface(name: &str) -> bool {
    interface_index(name).is_some()
}

impl KernelPlane {
    /// Every rule of every policy, with its counters.
    pub fn rule_counts(&self) -> Vec<RuleCount> {
        self.policies.counts()
    }

    /// Names of policy and rule by the number that an event carries.
    pub fn rule_names(&self) -> HashMap<u16, (Name, Name)> {
        self.policies.names()
    }

    /// How often the programs had used up what they may spend.
    pub fn refused(&self, what: Spending) -> u64 {
        self.policies.refused(what)
    }

    /// Tells the programs which rules have their time now.
    ///
    /// # Errors
    ///
    /// When a table refuses a record.
    pub fn tell_time(&mut self, now: Timestamp) -> Result<()> {
        self.policies.tell_time(now)
    }

    /// Looks up the interfaces that rules name.
    ///
    /// # Errors
    ///
    /// When a table refuses a record.
    pub fn refresh_places(&mut self) -> Result<()> {
        self.policies.refresh_places()
    }

    /// Says which interfaces are of VLANs: their index, and that of the interface below. Who comes in by one above a packet
    /// program is not judged a second time.
    ///
    /// # Errors
    ///
    /// When a table refuses a record.
    pub fn note_tagged(&mut self, tagged: Vec<(u32, u32)>) -> Result<()> {
        self.policies.set_tagged(tagged)
    }

    /// Opens the ring buffer of the firewall log. Only one process may read it at a time.
    ///
    /// # Errors
    ///
    /// When it cannot be mapped.
    pub fn events(&self) -> Result<RingBuf<MapData>> {
        let data =
            MapData::from_pin(self.pins.pin("EVENTS")).context("no ring buffer is pinned")?;
        Ok(RingBuf::try_from(Map::RingBuf(data))?)
    }

    /// Asks the programs what would become of a connection.
    ///
    /// # Errors
    ///
    /// When there is no such interface, or the kernel refuses to run the program.
    pub fn explain(&mut self, question: &Question) -> Result<Found> {
        let Some(ingress) = interface_index(&question.interface) else {
            bail!("there is no interface {}", question.interface);
        };
        let packet = syn(question).context("the two addresses are of different families")?;
        self.run_packet("explain_tc", &packet, ingress)?;
        let found = self.policies.explanation()?;
        let member = found.member as u16;
        let snat = match found.snat {
            Addr::UNSET => None,
            like => Some(self.tables.next_source(member, like)),
        };
        let refused = match found.outcome {
            Explanation::REFUSED => DropReason::ALL
                .iter()
                .copied()
                .find(|reason| *reason as u32 == found.reason),
            _ if snat == Some(None) => Some(DropReason::PortsExhausted),
            _ => None,
        };
        Ok(Found {
            virtual_server: found.virtual_server as u16,
            rules: found.rules.map(|rule| self.policies.rule_at(rule)),
            refused,
            member,
            snat: snat.flatten(),
            flow: None,
        })
    }
}

/// The first packet of the connection. Its checksums are zero; nobody looks at them here.
fn syn(question: &Question) -> Option<Vec<u8>> {
    let mut packet = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    if let Some(vlan) = question.vlan {
        packet.extend([0x81, 0]);
        packet.extend(vlan.to_be_bytes());
    }
    match (question.from, question.to) {
        (SocketAddr::V4(from), SocketAddr::V4(to)) => {
            packet.extend([8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0]);
            packet.extend(from.ip().octets());
            packet.extend(to.ip().octets());
        }
        (SocketAddr::V6(from), SocketAddr::V6(to)) => {
            packet.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 20, 6, 64]);
            packet.extend(from.ip().octets());
            packet.extend(to.ip().octets());
        }
        _ => return None,
    }
    packet.extend(question.from.port().to_be_bytes());
    packet.extend(question.to.port().to_be_bytes());
    packet.extend([0; 8]);
    packet.extend([5 << 4, 2, 0xff, 0xff, 0, 0, 0, 0]);
    Some(packet)
}
