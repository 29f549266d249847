//! What an earlier daemon left: taken over when it fits, refused by name when it does not.

use aya::maps::{Array, MapData};
use lb_common::layout::ABI_VERSION;
use lb_userspace::{
    dataplane::{FEW_FLOWS, KernelPlane},
    model::{Method, Snat},
};

use crate::{
    packet::{Packet, SYN},
    rig::{Outcome, Rig, generation},
};

const SERVICE: &str = "10.0.1.100:465";

#[test]
fn the_next_daemon_finds_flows_and_counters() {
    let site = || {
        generation(
            Method::RoundRobin,
            &[("mx", SERVICE, Snat::Automap, &["10.0.2.11:465"])],
        )
    };
    Rig::each("adopt", site, 1024, |rig| {
        let syn = Packet::new(
            "10.0.1.2:1000".parse().unwrap(),
            SERVICE.parse().unwrap(),
            SYN,
        );
        assert_eq!(rig.send(&syn.bytes(), "c0").0, Outcome::Sent);
        let next = KernelPlane::load(rig.bpffs(), 1024, false).unwrap();
        assert!(next.adopted());
        assert_eq!(next.flows().len(), 1);
        assert_eq!(next.generation(), 1);
        assert_eq!(
            next.number(&rig.generation).unwrap().members,
            rig.numbers.members
        );
    });
}

#[test]
fn a_flow_table_made_for_the_proxy_alone_is_made_anew() {
    Rig::each(
        "grow",
        || generation(Method::RoundRobin, &[]),
        FEW_FLOWS,
        |rig| {
            let next = KernelPlane::load(rig.bpffs(), 4096, false).unwrap();
            assert!(next.adopted());
            assert_eq!(next.flows_max(), 4096);
        },
    );
}

#[test]
fn a_map_of_another_shape_is_refused() {
    Rig::each(
        "shape",
        || generation(Method::RoundRobin, &[]),
        64,
        |rig| {
            let pin = rig.bpffs().join(format!("v{ABI_VERSION}/MEMBERS"));
            std::fs::remove_file(&pin).unwrap();
            let other: Array<MapData, u64> = Array::create(8, 0).unwrap();
            other.pin(&pin).unwrap();
            let Err(error) = KernelPlane::load(rig.bpffs(), 64, false) else {
                panic!("a map of another shape was taken over");
            };
            let text = format!("{error:#}");
            assert!(text.contains("MEMBERS"), "{text}");
            assert!(text.contains("values of 8 bytes"), "{text}");
        },
    );
}
