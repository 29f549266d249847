//! Whom a header of a balancer in front cannot name.

use std::{net::SocketAddr, sync::Arc};

use super::{
    entry::{trusting, v2_header},
    peers::{Kind, Lab, cell, good, like},
};
use crate::{
    model::Method,
    pool::{LiveMember, LivePool},
    proxy::{Service, Source, Sources},
    smtp::end::End,
};

#[test]
fn clients_on_this_host_or_link_are_named_by_nobody() {
    let lab = Lab::on(Kind::Plain, &[good], &trusting());
    let sources = ["127.0.0.1:1", "169.254.1.1:1", "[::1]:1", "[fe80::1]:1"];
    for (count, source) in (1..).zip(sources) {
        let mut client = lab.connect();
        client.send(v2_header(source));
        assert_eq!(client.rest(), b"", "{source}");
        assert_eq!(lab.ends.wait(count)[count - 1].end, End::BadProxyHeader);
    }
}

#[test]
fn nobody_becomes_a_virtual_server_or_a_member_by_a_header() {
    let lab = Lab::on(Kind::Plain, &[good], &trusting());
    let service = lab.services.find(lab.address).unwrap();
    let at = |address: &str| address.parse::<SocketAddr>().unwrap();
    let member = LiveMember::new("far".into(), at("192.0.2.60:25"), 9, true, cell());
    let member = Arc::new(member);
    let with = |source| {
        let members = vec![member.clone()];
        lab.services.replace([
            Arc::new(Service {
                source,
                ..like(&service)
            }),
            Arc::new(Service {
                at: at("192.0.2.50:2525").into(),
                pool: Arc::new(LivePool::new("far".into(), Method::RoundRobin, members)),
                ..like(&service)
            }),
        ]);
    };
    let headers = || ["192.0.2.50:4711", "192.0.2.60:4711"].map(v2_header);
    with(Sources::default().clients());
    for (count, header) in (1..).zip(headers()) {
        let mut client = lab.connect();
        client.send(header);
        assert_eq!(client.rest(), b"");
        assert_eq!(lab.ends.wait(count)[count - 1].end, End::BadProxyHeader);
    }
    // Behind an address of the box's, the name does no harm.
    with(Source::Own);
    for header in headers() {
        let mut client = lab.connect();
        client.send(header);
        assert_eq!(client.reply(), "220 good ESMTP\r\n");
    }
}
