//! `[virtual_server.NAME]`.

use std::net::IpAddr;

use super::{
    INCOMPLETE, Terms, address,
    policy::Guard,
    ports, source,
    tls::{ClientKeys, ServerKeys},
};
use crate::config::{
    diagnostic::Faults,
    reader::{At, Field, Section},
};

/// One virtual server.
pub(in crate::config) struct VirtualServer<'d> {
    pub(in crate::config) name: At<&'d str>,
    pub(in crate::config) object: String,
    /// The first address, and how many of its bits count.
    pub(in crate::config) address: Field<(IpAddr, u8)>,
    /// From the first to the last; sorted and disjoint.
    pub(in crate::config) ports: Field<Vec<(u16, u16)>>,
    pub(in crate::config) forward: Field<Plane>,
    pub(in crate::config) pool: Field<&'d str>,
    /// A word, or the name of a SNAT pool.
    pub(in crate::config) snat: Field<&'d str>,
    pub(in crate::config) client: ClientKeys<'d>,
    pub(in crate::config) server: ServerKeys<'d>,
    pub(in crate::config) xclient: Field<bool>,
    pub(in crate::config) guard: Guard<'d>,
    pub(in crate::config) terms: Terms,
}

/// `forward`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::config) enum Plane {
    Passthrough,
    Proxy,
}

pub(super) fn read<'d>(
    name: At<&'d str>,
    mut section: Section<'d, '_>,
    faults: &mut Faults,
) -> VirtualServer<'d> {
    let example = "address = \"203.0.113.10\"";
    let address = section
        .string("address", example, faults)
        .and_then(|text| address::of_virtual_server(&text, &section.object, faults));
    let address = section.required(address, "address", INCOMPLETE, example, faults);
    let ports = ports::read(&mut section, faults);
    let ports = section.required(ports, "port", INCOMPLETE, "port = \"submission\"", faults);
    let forward = section.choice(
        "forward",
        &[("passthrough", Plane::Passthrough), ("proxy", Plane::Proxy)],
        &[],
        faults,
    );
    let forward = section.required(
        forward,
        "forward",
        "The kernel plane and the proxy plane treat clients differently; neither is a safe guess.",
        "forward = \"passthrough\"",
        faults,
    );
    let pool = section.string("pool", "pool = \"msa\"", faults);
    let pool = section.required(
        pool,
        "pool",
        "Every connection to it would be refused.",
        "pool = \"msa\"",
        faults,
    );
    let snat = section.string("snat", "snat = \"automap\"", faults);
    let client = ClientKeys::read(&mut section, faults);
    let server = ServerKeys::read(&mut section, faults);
    let xclient = section.boolean("xclient", "xclient = true", faults);
    let terms = Terms::read(&mut section, faults);
    let mut guard = Guard::read(&mut section, faults);
    guard.rate = source::rate(&mut section, faults);
    let object = section.object.clone();
    section.finish(faults);
    VirtualServer {
        name,
        object,
        address,
        ports,
        forward,
        pool,
        snat,
        client,
        server,
        xclient,
        guard,
        terms,
    }
}

/// A TCP port as a number; also how members write theirs.
pub(super) fn port_number(
    key: &'static str,
    section: &mut Section<'_, '_>,
    faults: &mut Faults,
) -> Field<u16> {
    section
        .integer(key, 1..=65_535, "port = 25", faults)
        .and_then(|port| u16::try_from(port.value).ok())
}
