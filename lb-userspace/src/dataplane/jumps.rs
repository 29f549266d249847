//! The programs that others jump to: every load has its own tables of them, so that a program never meets one of another
//! version.

use anyhow::{Context, Result};
use aya::{
    Ebpf,
    maps::{Map, ProgramArray},
};
use lb_common::layout::Jump;

use super::{bpffs::PinDirectory, links::Hook, loader};
use crate::admin::view::DegradedView;

/// The jump tables of one load. The kernel empties a table when nobody holds or pins it, so they are pinned as long as
/// the programs are attached.
pub(super) struct Jumps {
    tables: Vec<(Hook, Map)>,
    /// Programs that this kernel refuses and the others do without.
    left_out: Vec<DegradedView>,
    /// Distinguishes our pins from those of another load.
    instance: u32,
}

impl Jumps {
    /// No table yet.
    pub(super) const fn new(instance: u32) -> Self {
        Self {
            tables: Vec::new(),
            left_out: Vec::new(),
            instance,
        }
    }

    /// Loads the programs that those of a hook may jump to. One that the kernel refuses is left out, and named by
    /// [`Self::left_out`]: what it would carry is dropped as `internal`.
    ///
    /// # Errors
    ///
    /// When the kernel refuses one that no connection can do without.
    pub(super) fn ready(&mut self, ebpf: &mut Ebpf, hook: Hook) -> Result<()> {
        if self.tables.iter().any(|(known, _)| *known == hook) {
            return Ok(());
        }
        let mut map = loader::map(ebpf, hook.jumps())?;
        let mut table = ProgramArray::try_from(&mut map)?;
        for jump in Jump::ALL {
            let name = format!("{}_{}", jump.word(), hook.suffix());
            if ebpf.program(&name).is_none() {
                continue;
            }
            let loaded = match hook {
                Hook::Tc => {
                    loader::classifier(ebpf, &name).and_then(|it| Ok(it.fd()?.try_clone()?))
                }
                Hook::Xdp | Hook::XdpGeneric => {
                    loader::xdp(ebpf, &name).and_then(|it| Ok(it.fd()?.try_clone()?))
                }
            };
            let fd = match loaded {
                Ok(fd) => fd,
                Err(error) if jump.is_optional() => {
                    log::warn!("{error:#}");
                    let first = error.to_string();
                    self.left_out.push(DegradedView {
                        lacks: format!("{}-{}", jump.word(), hook.suffix().replace('_', "-")),
                        why: first.lines().next().unwrap_or_default().to_owned(),
                    });
                    continue;
                }
                Err(error) => return Err(error),
            };
            table
                .set(jump as u32, &fd, 0)
                .with_context(|| format!("cannot make {name} a target of jumps"))?;
        }
        self.tables.push((hook, map));
        Ok(())
    }

    /// Programs that this kernel has refused, and what it said.
    pub(super) fn left_out(&self) -> &[DegradedView] {
        &self.left_out
    }

    /// Keeps the tables beyond the life of this process.
    ///
    /// # Errors
    ///
    /// When one cannot be pinned.
    pub(super) fn pin(&self, pins: &PinDirectory) -> Result<()> {
        for (hook, map) in &self.tables {
            let path = pins.pin(&self.name(*hook));
            if !path.exists() {
                map.pin(&path)?;
            }
        }
        Ok(())
    }

    /// Lets go of the tables of earlier loads, once nobody runs their programs.
    ///
    /// # Errors
    ///
    /// When a pin cannot be removed.
    pub(super) fn unpin_others(&self, pins: &PinDirectory) -> Result<()> {
        let ours: Vec<_> = self
            .tables
            .iter()
            .map(|(hook, _)| self.name(*hook))
            .collect();
        for name in pins.names() {
            if name.starts_with("jumps-") && !ours.contains(&name) {
                pins.unpin(&name)?;
            }
        }
        Ok(())
    }

    fn name(&self, hook: Hook) -> String {
        format!("jumps-{}-{:08x}", hook.suffix(), self.instance)
    }
}
