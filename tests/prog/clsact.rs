//! The TC hook of kernels before 6.6, which newer ones still have.

use std::process::Command;

use lb_userspace::model::Method;

use crate::rig::{Rig, generation};

/// The filters of an interface's ingress, as `tc` tells them.
fn filters(interface: &str) -> String {
    let arguments = ["filter", "show", "dev", interface, "ingress"];
    let output = Command::new("tc")
        .args(arguments)
        .output()
        .expect("tc runs");
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn a_filter_is_swapped_in_place_outlives_its_daemon_and_goes() {
    Rig::each(
        "clsact",
        || generation(Method::RoundRobin, &[]),
        1024,
        |rig| {
            if rig.program != "balance_tc" {
                return;
            }
            let generation = rig.generation.clone();
            for _ in 0..3 {
                rig.plane.attach_clsact(&generation).unwrap();
                for interface in ["c0", "s0"] {
                    let text = filters(interface);
                    assert_eq!(text.matches("handle 0x1 balance_tc").count(), 1, "{text}");
                    assert_eq!(text.matches("handle ").count(), 1, "{text}");
                }
            }
            rig.plane.detach_clsact(&generation);
            for interface in ["c0", "s0"] {
                assert_eq!(filters(interface), "");
            }
        },
    );
}
