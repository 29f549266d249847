//! What the running kernel lacks: what nothing works without is refused by name, the rest is named in `status`.

use std::{fs, path::Path};

use anyhow::{Result, bail};
use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
    util::KernelVersion,
};

use super::links;
use crate::admin::view::DegradedView;

/// How the kernel tells whether it can do something. It is asked where it answers, since distributions bring features to
/// older kernels.
enum Sign {
    Helper(ProgramType, BpfHelper),
    Asked(fn() -> bool),
    Version(u8, u8),
}

impl Sign {
    /// Unknown counts as there: loading will tell.
    fn is_there(&self) -> bool {
        match *self {
            Self::Helper(program, helper) => is_helper_supported(program, helper).unwrap_or(true),
            Self::Asked(ask) => ask(),
            Self::Version(major, minor) => KernelVersion::current()
                .is_ok_and(|version| version >= KernelVersion::new(major, minor, 0)),
        }
    }
}

/// Something that not every supported kernel can do.
struct Feature {
    /// Stable word, as in `docs/kernel-support.md`.
    word: &'static str,
    sign: Sign,
    /// What is lost without it, and since when it is there.
    loss: &'static str,
}

const FEATURES: [Feature; 4] = [
    Feature {
        word: "tcx",
        sign: Sign::Asked(links::has_tcx),
        loss: "TC programs hang on a clsact filter, which is no link: other tools may remove it (Linux 6.6)",
    },
    Feature {
        word: "xdp",
        sign: Sign::Helper(ProgramType::Xdp, BpfHelper::BPF_FUNC_xdp_load_bytes),
        loss: "no XDP, TC carries everything (Linux 5.18)",
    },
    Feature {
        word: "address-marks",
        sign: Sign::Version(5, 18),
        loss: "which addresses are the daemon's is written down below --state; without that file, what a killed daemon left \
               counts as the admin's (Linux 5.18)",
    },
    Feature {
        word: "steered-interface",
        sign: Sign::Version(5, 17),
        loss: "proxy connections by interfaces that client_interfaces does not name are judged by no policy (Linux 5.17)",
    },
];

/// What this kernel lacks and the kernel plane does without.
pub(super) fn degraded() -> Vec<DegradedView> {
    FEATURES
        .iter()
        .filter(|feature| !feature.sign.is_there())
        .map(|feature| DegradedView {
            lacks: feature.word.to_owned(),
            why: feature.loss.to_owned(),
        })
        .collect()
}

/// Can the kernel plane run on this kernel at all?
///
/// # Errors
///
/// Names what is missing and the kernel.
pub(super) fn check() -> Result<()> {
    let clock = Sign::Helper(
        ProgramType::SchedClassifier,
        BpfHelper::BPF_FUNC_ktime_get_coarse_ns,
    );
    let missing = if !clock.is_there() {
        "the coarse clock for packet programs (Linux 5.11)"
    } else if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        "its own BTF (CONFIG_DEBUG_INFO_BTF)"
    } else {
        return Ok(());
    };
    bail!(
        "this kernel, {}, lacks {missing}\n  smtplb needs Linux 5.15 or newer with BTF. Nothing was changed.",
        release()
    )
}

/// As `uname -r`.
pub(super) fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").map_or_else(
        |_| "unknown".to_owned(),
        |release| release.trim().to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_in_the_documentation() {
        let page = include_str!("../../../docs/kernel-support.md");
        for feature in &FEATURES {
            assert!(
                page.contains(&format!("`{}`", feature.word)),
                "{}",
                feature.word
            );
        }
    }
}
