//! What the kernel of this box can do, by name.

use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported},
    util::KernelVersion,
};

use super::links;

/// Something of the kernel that smtplb uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Feature {
    /// What it is called.
    pub name: &'static str,
    /// The first kernel that has it.
    pub since: (u8, u8),
    /// What follows where it is missing; nothing works without those that have no such word.
    pub without: Option<&'static str>,
    /// Does this kernel have it? `None`: it cannot be asked, for want of a privilege.
    pub present: Option<bool>,
}

/// Asks the kernel; its version, where it has no answer.
pub fn features() -> Vec<Feature> {
    let map = |kind| is_map_supported(kind).ok();
    let program = |kind| is_program_supported(kind).ok();
    let version = KernelVersion::current().ok();
    let since =
        |major, minor| version.map(|version| version >= KernelVersion::new(major, minor, 0));
    let feature = |name, since, without, present| Feature {
        name,
        since,
        without,
        present,
    };
    vec![
        feature(
            "BPF programs at the TC hook",
            (4, 1),
            None,
            program(ProgramType::SchedClassifier),
        ),
        feature(
            "arrays shared with the daemon (BPF_F_MMAPABLE)",
            (5, 5),
            None,
            since(5, 5),
        ),
        feature("ring buffer", (5, 8), None, map(MapType::RingBuf)),
        feature(
            "steering of new connections (sk_lookup)",
            (5, 9),
            None,
            program(ProgramType::SkLookup),
        ),
        feature(
            "atomic compare-and-swap in programs",
            (5, 12),
            None,
            since(5, 12),
        ),
        feature(
            "interface of a connection that is steered",
            (5, 17),
            Some(
                "policies do not judge proxy connections by interfaces that `client_interfaces` does not name",
            ),
            since(5, 17),
        ),
        feature(
            "verified size of programs",
            (5, 16),
            Some("`cargo xtask test prog` cannot watch it"),
            since(5, 16),
        ),
        feature(
            "XDP with frames of several pages (frags)",
            (5, 18),
            Some(
                "no XDP program loads, in the driver or generic; `attach = \"auto\"` takes TC, which carries everything",
            ),
            is_helper_supported(ProgramType::Xdp, BpfHelper::BPF_FUNC_xdp_load_bytes).ok(),
        ),
        feature(
            "marks on addresses (IFA_PROTO)",
            (5, 18),
            Some(
                "which addresses are the daemon's is written down below --state, and lost with it",
            ),
            since(5, 18),
        ),
        feature(
            "tcx links",
            (6, 6),
            Some("TC filters sit in the clsact qdisc, and whoever flushes it removes them"),
            links::answers_tcx(),
        ),
    ]
}
