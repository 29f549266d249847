//! What the programs cost the verifier: the budget keeps them loadable on older kernels.

use lb_userspace::model::Method;

use crate::rig::{Rig, generation};

/// Instructions that the verifier may walk for one program.
const BUDGET: u32 = 40_000;

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
                    (walked > BUDGET).then(|| format!("{program}: {walked} of {BUDGET}"))
                })
                .collect();
            assert!(over.is_empty(), "{}", over.join("\n"));
        },
    );
}
