//! Loads the packet programs with the maps that are pinned, or new ones.

use anyhow::{Context, Result, anyhow, bail};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapInfo},
    programs::{ProgramError, SchedClassifier, SkLookup, Xdp},
    util::KernelVersion,
};

use lb_common::{
    index::WAYS,
    pair::{CHUNK, chunks_for, pairs_for},
};

use super::{FEW_FLOWS, bpffs::PinDirectory};

/// The packet programs, built for the BPF target.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("SMTPLB_EBPF_OBJECT"));

/// Maps that outlive the daemon.
pub(super) const PINNED: &[&str] = &[
    "CONFIG",
    "SERVICES",
    "PAIR_INDEX",
    "POOLS",
    "SNAT_SOURCES",
    "PORT_SETS",
    "TURNS",
    "MEMBERS",
    "MEMBER_CELLS",
    "SERVICE_CELLS",
    "PAIRS",
    "CHUNKS",
    "FREE",
    "FLOWS",
    "FLOW_INDEX",
    "ALLOCATION",
    "DROPS",
    "FLOW_ENDS",
    "FLOW_ENDS_LOST",
    "LISTENERS",
    "SCRATCH",
    "FRAGMENTS",
    "VLANS",
    "PREFIXES",
    "GUARDS",
    "POLICIES",
    "RULES",
    "BOUNDS",
    "SCHEDULED",
    "CONDITIONS",
    "JUDGED",
    "RULE_CELLS",
    "SOURCES",
    "BUDGETS",
    "EVENTS",
];

/// Maps whose capacity follows the number of flows; they belong together.
const BY_FLOWS: [&str; 6] = [
    "PAIRS",
    "CHUNKS",
    "FREE",
    "FLOWS",
    "FLOW_INDEX",
    "ALLOCATION",
];

/// Capacities for so many flows: whole chunks, and one more that stays unused.
struct Capacities {
    flows: u32,
    chunks: u32,
    pairs: u32,
    buckets: u32,
}

impl Capacities {
    fn of(flows: u32) -> Self {
        let chunks = chunks_for(flows);
        Self {
            flows: chunks * CHUNK,
            chunks,
            pairs: pairs_for(flows),
            // A quarter full when the flow table is; twice that with `snat = "none"`, where a flow has two entries.
            buckets: (flows / (WAYS as u32 / 4)).max(16).next_power_of_two(),
        }
    }
}

/// The loaded object, and what was found when it was.
pub(super) struct Loaded {
    /// Programs and maps.
    pub ebpf: Ebpf,
    /// Maps of an earlier daemon were taken over.
    pub adopted: bool,
}

/// Loads the object. Maps that are pinned are taken over after their sizes were checked; the others are made and pinned.
///
/// # Errors
///
/// When a pinned map has another shape, or the kernel refuses a map or a program.
pub(super) fn load(pins: &PinDirectory, flows: u32, kernel_log: bool) -> Result<Loaded> {
    let names = pins.names();
    let adopted = names.iter().any(|name| name == "CONFIG");
    let paths: Vec<_> = PINNED.iter().map(|name| (*name, pins.pin(name))).collect();
    let log = u32::from(kernel_log);
    let judges = u32::from(
        KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(5, 17, 0)),
    );
    let capacities = Capacities::of(flows);
    let mut loader = EbpfLoader::new();
    loader
        .map_max_entries("FLOWS", capacities.flows)
        .map_max_entries("CHUNKS", capacities.chunks)
        .map_max_entries("FREE", capacities.chunks)
        .map_max_entries("PAIRS", capacities.pairs)
        .map_max_entries("FLOW_INDEX", capacities.buckets)
        .override_global("KERNEL_LOG", &log, true)
        .override_global("STEER_JUDGES", &judges, true);
    for (name, path) in &paths {
        loader.map_pin_path(name, path.as_path());
    }
    if !names.is_empty() {
        check_shapes(pins, flows)?;
    }
    let ebpf = loader
        .load(OBJECT)
        .context("the kernel refused the maps of the packet programs")?;
    Ok(Loaded { ebpf, adopted })
}

/// Unpins flow tables of an earlier daemon that needed none, so that they are made anew in full size.
///
/// # Errors
///
/// When a pin cannot be removed.
pub(super) fn drop_small_tables(pins: &PinDirectory) -> Result<()> {
    let info = MapInfo::from_pin(pins.pin("FLOWS"));
    if info.is_ok_and(|info| info.max_entries() == Capacities::of(FEW_FLOWS).flows) {
        for name in BY_FLOWS {
            pins.unpin(name)?;
        }
    }
    Ok(())
}

/// Loads a TC program into the kernel.
///
/// # Errors
///
/// With the verifier's last words when the kernel refuses it.
pub(super) fn classifier<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier> {
    let program: &mut SchedClassifier = program(ebpf, name)?.try_into()?;
    if program.fd().is_err() {
        program.load().map_err(|error| refused(name, error))?;
    }
    Ok(program)
}

/// Loads an XDP program into the kernel.
///
/// # Errors
///
/// With the verifier's last words when the kernel refuses it.
pub(super) fn xdp<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    let program: &mut Xdp = program(ebpf, name)?.try_into()?;
    if program.fd().is_err() {
        program.load().map_err(|error| refused(name, error))?;
    }
    Ok(program)
}

/// Loads the steering program into the kernel.
///
/// # Errors
///
/// With the verifier's last words when the kernel refuses it.
pub(super) fn sk_lookup<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SkLookup> {
    let program: &mut SkLookup = program(ebpf, name)?.try_into()?;
    if program.fd().is_err() {
        program.load().map_err(|error| refused(name, error))?;
    }
    Ok(program)
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut aya::programs::Program> {
    ebpf.program_mut(name)
        .ok_or_else(|| anyhow!("the object has no program {name}"))
}

/// Takes a map out of the loaded object.
///
/// # Errors
///
/// When the object has no such map.
pub(super) fn map(ebpf: &mut Ebpf, name: &str) -> Result<Map> {
    ebpf.take_map(name)
        .ok_or_else(|| anyhow!("the object has no map {name}"))
}

fn refused(name: &str, error: ProgramError) -> anyhow::Error {
    let ProgramError::LoadError {
        io_error,
        verifier_log,
    } = &error
    else {
        return anyhow!(error).context(format!("cannot load the program {name}"));
    };
    let log = verifier_log.to_string();
    let last: Vec<_> = log
        .lines()
        .rev()
        .filter(|line| !line.is_empty())
        .take(24)
        .collect();
    let last: Vec<_> = last.into_iter().rev().collect();
    anyhow!(
        "the kernel refused the program {name}: {io_error}\n  smtplb needs Linux 5.15 or newer with BTF; the verifier's last words:\n  {}",
        last.join("\n  ")
    )
}

/// A map of another shape would make programs and daemon read past its records.
fn check_shapes(pins: &PinDirectory, flows: u32) -> Result<()> {
    let object = aya_obj::Object::parse(OBJECT).context("the embedded object is damaged")?;
    for &name in PINNED {
        let (Some(map), Ok(info)) = (object.maps.get(name), MapInfo::from_pin(pins.pin(name)))
        else {
            continue;
        };
        let (key, value) = (map.key_size(), map.value_size());
        if (info.key_size(), info.value_size()) != (key, value) {
            bail!(
                "the pinned map {} has keys of {} and values of {} bytes, this version needs {key} and {value}\n  \
                 It belongs to another build of the same layout version. Stop that one, or remove the directory's pins.",
                pins.pin(name).display(),
                info.key_size(),
                info.value_size()
            );
        }
        if name == "FLOWS" && info.max_entries() != Capacities::of(flows).flows {
            log::warn!(
                "max_flows = {flows} takes effect after a full stop: {} records are in use since an earlier start",
                info.max_entries()
            );
        }
    }
    Ok(())
}
