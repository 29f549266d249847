//! Programs run and looked at without a wire: for tests, benchmarks, and answers to "what if".

use anyhow::{Context, Result};
use aya::programs::{TestRun as _, TestRunOptions};

use super::{KernelPlane, links::Hook, loader};

impl KernelPlane {
    /// Attaches a program that passes everything, in the driver, until this process ends: a veth delivers redirected
    /// frames only when its peer has an XDP program.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn pass_natively(&mut self, interfaces: &[&str]) -> Result<()> {
        let program = loader::xdp(&mut self.ebpf, "pass")?;
        for interface in interfaces {
            program.attach(interface, aya::programs::XdpMode::Driver)?;
        }
        Ok(())
    }

    /// A loaded packet program, for a program that calls it.
    ///
    /// # Errors
    ///
    /// When the program is unknown, or the kernel refuses it.
    pub fn program(&mut self, name: &str) -> Result<aya::programs::ProgramFd> {
        let hook = Hook::of(name);
        self.jumps.ready(&mut self.ebpf, hook)?;
        let program = match hook {
            Hook::Tc => loader::classifier(&mut self.ebpf, name)?.fd()?,
            Hook::Xdp | Hook::XdpGeneric => loader::xdp(&mut self.ebpf, name)?.fd()?,
        };
        Ok(program.try_clone()?)
    }

    /// Names of the programs for the hook of one.
    pub fn programs(&self, program: &str) -> Vec<String> {
        let names = self.ebpf.programs().map(|(name, _)| name);
        names
            .filter(|name| Hook::of(name) == Hook::of(program) && *name != "pass")
            .filter(|name| name.ends_with(Hook::of(program).suffix()))
            .map(str::to_owned)
            .collect()
    }

    /// How many instructions the verifier walked for a program (Linux 5.16).
    ///
    /// # Errors
    ///
    /// When the kernel refuses the program or does not tell.
    pub fn verified_instructions(&mut self, program: &str) -> Result<u32> {
        let info = match Hook::of(program) {
            Hook::Tc => loader::classifier(&mut self.ebpf, program)?.info()?,
            Hook::Xdp | Hook::XdpGeneric => loader::xdp(&mut self.ebpf, program)?.info()?,
        };
        info.verified_instruction_count()
            .context("the kernel does not tell")
    }

    /// Runs one packet through a program without a wire: the return code, and the packet afterwards.
    ///
    /// # Errors
    ///
    /// When the program is unknown, or the kernel refuses to run it.
    pub fn run_packet(
        &mut self,
        program: &str,
        packet: &[u8],
        ingress: u32,
    ) -> Result<(u32, Vec<u8>)> {
        self.run_packets(program, packet, ingress, 1)
    }

    /// Runs the same packet over and over; what a program has changed in it stays changed.
    ///
    /// # Errors
    ///
    /// As of [`Self::run_packet`].
    pub fn run_packets(
        &mut self,
        program: &str,
        packet: &[u8],
        ingress: u32,
        repeat: u32,
    ) -> Result<(u32, Vec<u8>)> {
        self.jumps.ready(&mut self.ebpf, Hook::of(program))?;
        let mut out = vec![0; packet.len() + 256];
        let mut options = TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            repeat,
            ..TestRunOptions::new()
        };
        let mut context;
        let result = if Hook::of(program) != Hook::Tc {
            // struct xdp_md: data_end is the length, then the interface.
            context = vec![0; 24];
            context[4..8].copy_from_slice(&(packet.len() as u32).to_ne_bytes());
            context[12..16].copy_from_slice(&ingress.to_ne_bytes());
            options.ctx_in = Some(&context);
            loader::xdp(&mut self.ebpf, program)?.test_run(options)
        } else {
            // struct __sk_buff: ingress_ifindex, ifindex.
            context = vec![0; 192];
            context[36..40].copy_from_slice(&ingress.to_ne_bytes());
            context[40..44].copy_from_slice(&ingress.to_ne_bytes());
            options.ctx_in = Some(&context);
            loader::classifier(&mut self.ebpf, program)?.test_run(options)
        }
        .with_context(|| format!("cannot run a packet through {program}"))?;
        out.truncate(result.data_size_out as usize);
        Ok((result.return_value, out))
    }
}
