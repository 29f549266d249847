//! What the programs cost the verifier: the budget keeps them loadable on older kernels.

use aya::util::KernelVersion;
use lb_userspace::model::Method;

use crate::rig::{Rig, generation};

/// Instructions that the verifier may walk for one program.
const BUDGET: u32 = 30_000;

/// Older kernels see less often that they have been there before.
fn budget() -> u32 {
    match KernelVersion::current().is_ok_and(|version| version < KernelVersion::new(6, 8, 0)) {
        true => 2 * BUDGET,
        false => BUDGET,
    }
}

#[test]
fn the_verifier_walks_few_instructions() {
    Rig::each(
        "budget",
        || generation(Method::RoundRobin, &[]),
        64,
        |rig| {
            let over: Vec<_> = rig
                .plane
                .programs(rig.program)
                .into_iter()
                .filter_map(|program| {
                    let walked = match rig.plane.verified_instructions(&program) {
                        Ok(walked) => walked,
                        Err(error) => return Some(format!("{program}: {error:#}")),
                    };
                    println!("{program}: {walked} instructions verified");
                    (walked > budget()).then(|| format!("{program}: {walked} of {}", budget()))
                })
                .collect();
            assert!(over.is_empty(), "{}", over.join("\n"));
        },
    );
}
