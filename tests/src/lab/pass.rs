//! The smallest XDP program: lets everything pass.
//!
//! A virtual link delivers what XDP transmits or redirects into it only when its far end runs XDP too, or at least
//! NAPI. The program is made here, from its two instructions, so that the lab needs no object file.

use anyhow::{Context, Result};
use aya::{
    Ebpf,
    programs::{Xdp, XdpMode},
};
use object::{
    Architecture, BinaryFormat, Endianness, SectionKind, SymbolFlags, SymbolKind, SymbolScope,
    write::{Object, Symbol, SymbolSection},
};

use super::namespace::Namespace;

/// The program on an interface; comes off when dropped.
#[derive(Debug)]
pub(crate) struct Pass {
    _program: Ebpf,
}

impl Pass {
    /// # Errors
    /// When the kernel refuses the program or the interface.
    pub(crate) fn attach(namespace: &Namespace, interface: &str) -> Result<Self> {
        let object = object()?;
        namespace.enter(|| {
            let mut ebpf = Ebpf::load(&object).context("cannot read the pass program")?;
            let program: &mut Xdp = ebpf
                .program_mut("pass")
                .context("the object has no program `pass`")?
                .try_into()?;
            program.load()?;
            program
                .attach(interface, XdpMode::Driver)
                .with_context(|| format!("cannot attach to {interface} of {}", namespace.name()))?;
            Ok(Self { _program: ebpf })
        })
    }
}

/// An ELF object with the one program in section `xdp.frags`: a link with a program that takes no pieces is limited to a page.
fn object() -> Result<Vec<u8>> {
    // r0 = XDP_PASS (2); exit
    const CODE: [u8; 16] = [0xb7, 0, 0, 0, 2, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0];
    let mut object = Object::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
    let section = object.add_section(Vec::new(), b"xdp.frags".to_vec(), SectionKind::Text);
    object.append_section_data(section, &CODE, 8);
    object.add_symbol(Symbol {
        name: b"pass".to_vec(),
        value: 0,
        size: CODE.len() as u64,
        kind: SymbolKind::Text,
        scope: SymbolScope::Linkage,
        weak: false,
        section: SymbolSection::Section(section),
        flags: SymbolFlags::None,
    });
    object.write().context("cannot write the pass program")
}
