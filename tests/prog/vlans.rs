//! VLANs that clients may use, whichever plane serves them.

use std::{net::SocketAddr, sync::Arc};

use lb_common::reason::DropReason;
use lb_userspace::{
    dataplane::Question,
    model::{ClientTls, Forward, Generation, Method, ServerTls, Snat, Terms, VirtualServer},
};

use crate::{
    packet::{Packet, SYN},
    rig::{Outcome, Rig, generation},
};

const SERVICE: &str = "10.0.1.100:465";
const MEMBER: &str = "10.0.2.11:4465";

fn make(forward: &Forward) -> Generation {
    let servers = [("four", SERVICE, Snat::Automap, &[MEMBER][..])];
    let mut generation = generation(Method::RoundRobin, &servers);
    generation.network.vlans = [10].into();
    for server in &mut generation.virtual_servers {
        *server = Arc::new(VirtualServer {
            forward: forward.clone(),
            ..(**server).clone()
        });
    }
    generation
}

#[test]
fn foreign_vlans_reach_neither_plane() {
    let passthrough = Forward::Passthrough {
        snat: Snat::Automap,
        proxy_protocol: false,
    };
    let proxy = Forward::Proxy {
        client_tls: ClientTls::None,
        terms: Terms::default(),
        server_tls: ServerTls::None,
        xclient: false,
    };
    for (name, forward, carried) in [
        ("vlans", passthrough, Outcome::Sent),
        ("vlans-proxy", proxy, Outcome::Passed),
    ] {
        Rig::each(
            name,
            || make(&forward),
            1024,
            |rig| {
                let at = |text: &str| text.parse::<SocketAddr>().expect("an address");
                let frame = Packet::new(at("10.0.1.2:1"), at(SERVICE), SYN).bytes();
                for (vlan, outcome, counted) in
                    [(10, carried, 0), (0, carried, 0), (20, Outcome::Dropped, 1)]
                {
                    let mut sent = frame.clone();
                    if vlan != 0 {
                        sent.splice(12..12, [0x81, 0, 0, vlan]);
                    }
                    assert_eq!(rig.send(&sent, "c0").0, outcome, "VLAN {vlan}");
                    assert_eq!(rig.drops("foreign-vlan"), counted, "VLAN {vlan}");
                    let question = Question {
                        from: at("10.0.1.2:2"),
                        to: at(SERVICE),
                        interface: "c0".to_owned(),
                        vlan: (vlan != 0).then_some(u16::from(vlan)),
                    };
                    let found = rig.plane.explain(&question).expect("an answer");
                    let refused = (counted != 0).then_some(DropReason::ForeignVlan);
                    assert_eq!(found.refused, refused, "VLAN {vlan}");
                }
            },
        );
    }
}
