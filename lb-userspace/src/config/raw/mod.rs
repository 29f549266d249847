//! The file in the user's words: each object by itself, its values typed, its unknown keys noted.

mod address;
mod policy;
mod pool;
mod ports;
mod session;
mod snat;
pub(super) mod source;
mod tls;
mod virtual_server;

use std::time::Duration;

use lb_common::layout::DEFAULT_FLOWS;
pub(super) use policy::{Guard, Policy, Rule, Verb};
pub(super) use pool::{Member, Pool};
pub(super) use session::{Pregreet, PregreetWord, Session, Terms};
pub(super) use snat::{SnatPool, Timeouts};
pub(super) use tls::{Asked, ClientKeys, Encryption, Proof, ServerKeys};
use toml::de::{DeTable, DeValue};
pub(super) use virtual_server::{Plane, VirtualServer};

use super::{
    diagnostic::{Faults, quoted},
    reader::{At, Field, Section},
};
use crate::model::{Attach, Mode, PortRange};

/// Consequence of a key that an object cannot do without.
const INCOMPLETE: &str = "Without it there is nothing to do.";

/// The whole file.
pub(super) struct Raw<'d> {
    pub(super) mode: Field<Mode>,
    pub(super) network: Network<'d>,
    pub(super) log: Log,
    pub(super) virtual_servers: Vec<VirtualServer<'d>>,
    pub(super) certificates: Vec<Certificate<'d>>,
    pub(super) pools: Vec<Pool<'d>>,
    pub(super) monitors: Vec<Monitor<'d>>,
    pub(super) snat_pools: Vec<SnatPool<'d>>,
    pub(super) timeouts: Timeouts,
    pub(super) session: Session,
    pub(super) policies: Vec<Policy<'d>>,
}

/// `[network]`.
pub(super) struct Network<'d> {
    /// Where the table begins, if there is one.
    pub(super) at: Option<usize>,
    pub(super) client_interfaces: Field<Vec<At<&'d str>>>,
    pub(super) server_interfaces: Field<Vec<At<&'d str>>>,
    pub(super) attach: Field<Attach>,
    pub(super) max_flows: Field<u32>,
    pub(super) snat_ports: Field<PortRange>,
    pub(super) snat_exclude: Field<Vec<PortRange>>,
    pub(super) vlans: Field<Vec<At<u32>>>,
    pub(super) guard: Guard<'d>,
}

/// `[log]`.
pub(super) struct Log {
    pub(super) flows: Field<bool>,
    pub(super) flows_per_second: Field<u32>,
}

/// `[certificate.NAME]`.
pub(super) struct Certificate<'d> {
    pub(super) name: At<&'d str>,
    pub(super) object: String,
    pub(super) chain: Field<&'d str>,
    pub(super) key: Field<&'d str>,
}

/// `[monitor.NAME]`.
pub(super) struct Monitor<'d> {
    pub(super) name: At<&'d str>,
    pub(super) object: String,
    pub(super) kind: Field<ProbeKind>,
    pub(super) interval: Field<Duration>,
    pub(super) timeout: Field<Duration>,
    pub(super) rise: Field<u32>,
    pub(super) fall: Field<u32>,
    pub(super) helo: Field<&'d str>,
}

/// `monitor.type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ProbeKind {
    Tcp,
    Smtp,
}

/// Reads all there is.
pub(super) fn read<'d>(document: &'d DeTable<'_>, faults: &mut Faults) -> Raw<'d> {
    let mut top = Section::new("the file".to_owned(), 0, document);
    let mode = top.choice(
        "mode",
        &[
            ("mixed", Mode::Mixed),
            ("passthrough-only", Mode::PassthroughOnly),
        ],
        &[],
        faults,
    );
    let network = network(&mut top, faults);
    let log = log(&mut top, faults);
    let virtual_servers = top
        .named("virtual_server", "virtual server", faults)
        .into_iter()
        .map(|(name, section)| virtual_server::read(name, section, faults))
        .collect();
    let certificates = top
        .named("certificate", "certificate", faults)
        .into_iter()
        .map(|(name, section)| certificate(name, section, faults))
        .collect();
    let pools = top
        .named("pool", "pool", faults)
        .into_iter()
        .map(|(name, section)| pool::read(name, section, faults))
        .collect();
    let monitors = top
        .named("monitor", "monitor", faults)
        .into_iter()
        .map(|(name, section)| monitor(name, section, faults))
        .collect();
    let snat_pools = top
        .named("snat", "SNAT pool", faults)
        .into_iter()
        .map(|(name, section)| snat::read(name, section, faults))
        .collect();
    let timeouts = snat::timeouts(&mut top, faults);
    let session = session::read(&mut top, faults);
    let policies = top
        .named("policy", "policy", faults)
        .into_iter()
        .map(|(name, section)| policy::read(name, section, faults))
        .collect();
    top.finish(faults);
    Raw {
        mode,
        network,
        log,
        virtual_servers,
        certificates,
        pools,
        monitors,
        snat_pools,
        timeouts,
        session,
        policies,
    }
}

/// A table that is there once, like `[network]`.
fn single<'d, 'i>(
    top: &mut Section<'d, 'i>,
    key: &'static str,
    faults: &mut Faults,
) -> Field<Section<'d, 'i>> {
    let Some(value) = top.value(key) else {
        return Field::Absent;
    };
    let at = value.span().start;
    match value.get_ref() {
        DeValue::Table(entries) => Field::Is(At {
            value: Section::new(key.to_owned(), at, entries),
            at,
        }),
        _ => {
            faults.error(
                at,
                key,
                "is not a table",
                "Nothing can be read from it.",
                format!("Begin it with a line `[{key}]`."),
            );
            Field::Wrong
        }
    }
}

fn log(top: &mut Section<'_, '_>, faults: &mut Faults) -> Log {
    let mut section = match single(top, "log", faults) {
        Field::Is(section) => section.value,
        Field::Absent | Field::Wrong => {
            return Log {
                flows: Field::Absent,
                flows_per_second: Field::Absent,
            };
        }
    };
    let log = Log {
        flows: section.boolean("flows", "flows = true", faults),
        flows_per_second: section.integer(
            "flows_per_second",
            1..=1_000_000,
            "flows_per_second = 1000",
            faults,
        ),
    };
    section.finish(faults);
    log
}

fn network<'d>(top: &mut Section<'d, '_>, faults: &mut Faults) -> Network<'d> {
    let section = single(top, "network", faults);
    let absent = matches!(section, Field::Absent);
    let Field::Is(At {
        value: mut section, ..
    }) = section
    else {
        // A value of the wrong type has been noted above: nothing more may be said about its keys.
        let interfaces = || if absent { Field::Absent } else { Field::Wrong };
        return Network {
            at: None,
            client_interfaces: interfaces(),
            server_interfaces: interfaces(),
            attach: Field::Absent,
            max_flows: Field::Absent,
            snat_ports: Field::Absent,
            snat_exclude: Field::Absent,
            vlans: Field::Absent,
            guard: Guard::none(),
        };
    };
    let network = Network {
        at: Some(section.at),
        client_interfaces: section.strings(
            "client_interfaces",
            "client_interfaces = [\"eth0\"]",
            faults,
        ),
        server_interfaces: section.strings(
            "server_interfaces",
            "server_interfaces = [\"eth1\"]",
            faults,
        ),
        attach: section.choice(
            "attach",
            &[
                ("auto", Attach::Auto),
                ("xdp", Attach::Xdp),
                ("xdp-generic", Attach::XdpGeneric),
                ("tc", Attach::Tc),
            ],
            &[],
            faults,
        ),
        max_flows: section.integer(
            "max_flows",
            1024..=16_777_216,
            &format!("max_flows = {DEFAULT_FLOWS}"),
            faults,
        ),
        snat_ports: snat::range("snat_ports", &mut section, faults),
        snat_exclude: snat::ranges("snat_exclude", &mut section, faults),
        // 0 and 4095 are no VLANs (IEEE 802.1Q-2022 §9.6).
        vlans: section.integers("vlans", 1..=4094, "vlans = [10, 20]", faults),
        guard: Guard::read(&mut section, faults),
    };
    section.finish(faults);
    network
}

fn certificate<'d>(
    name: At<&'d str>,
    mut section: Section<'d, '_>,
    faults: &mut Faults,
) -> Certificate<'d> {
    let mut file = |key, example: &str| {
        let path = section.string(key, example, faults).and_then(|path| {
            if path.value.is_empty() || path.value.contains('\0') {
                faults.error(
                    path.at,
                    &section.object,
                    format!("has {key} = {}, which is no path", quoted(path.value)),
                    "No TLS session could be served with it.",
                    format!("Write for example `{example}`."),
                );
                return None;
            }
            Some(path.value)
        });
        section.required(
            path,
            key,
            "No TLS session could be served with it.",
            example,
            faults,
        )
    };
    let chain = file("chain", "chain = \"/etc/smtplb/mail.pem\"");
    let key = file("key", "key = \"/etc/smtplb/mail.key\"");
    let object = section.object.clone();
    section.finish(faults);
    Certificate {
        name,
        object,
        chain,
        key,
    }
}

fn monitor<'d>(
    name: At<&'d str>,
    mut section: Section<'d, '_>,
    faults: &mut Faults,
) -> Monitor<'d> {
    let instead = "Use type = \"smtp\" or type = \"tcp\".";
    let kind = section.choice(
        "type",
        &[("smtp", ProbeKind::Smtp), ("tcp", ProbeKind::Tcp)],
        &[
            ("smtps", instead),
            ("smtp-starttls", instead),
            ("external", instead),
        ],
        faults,
    );
    let kind = section.required(
        kind,
        "type",
        "It would not be known what to ask a member.",
        "type = \"smtp\"",
        faults,
    );
    let interval = section.duration("interval", "interval = \"30s\"", faults);
    let timeout = section.duration("timeout", "timeout = \"91s\"", faults);
    let rise = section.integer("rise", 1..=1000, "rise = 1", faults);
    let fall = section.integer("fall", 1..=1000, "fall = 1", faults);
    let helo = section.string("helo", "helo = \"lb.example.org\"", faults).and_then(|helo| {
        // RFC 5321 §4.1.1.1 and §4.5.3.1.2: a domain or an address literal, at most 255 octets.
        let good = (1..=255).contains(&helo.value.len()) && helo.value.bytes().all(|byte| byte.is_ascii_graphic());
        if !good {
            faults.error(
                helo.at,
                &section.object,
                format!("has helo = {}, which cannot be said in EHLO", quoted(helo.value)),
                "Members would refuse the probe, or take the rest for another command.",
                "Write a host name in ASCII without spaces, for example `helo = \"lb.example.org\"`.",
            );
            return None;
        }
        Some(helo.value)
    });
    for key in ["auth", "message", "receive"] {
        section.later(
            key,
            "Remove it: type = \"smtp\" checks greeting, EHLO and QUIT.",
            faults,
        );
    }
    let object = section.object.clone();
    section.finish(faults);
    Monitor {
        name,
        object,
        kind,
        interval,
        timeout,
        rise,
        fall,
        helo,
    }
}
