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
            let walked = rig.plane.verified_instructions(rig.program).unwrap();
            println!("{}: {walked} instructions verified", rig.program);
            assert!(walked <= BUDGET, "{}: {walked} of {BUDGET}", rig.program);
        },
    );
}
