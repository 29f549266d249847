//! Reload: the next generation is built beside the one in use, then takes its place at once.
//!
//! Everything that can be wrong is looked at before anything changes. What can fail after that comes before the flip and
//! is taken back when it does. Connections of what is gone go on until they end; only then is the last of it removed.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use lb_common::pair::CHUNK;

use super::{
    Daemon, Former, Lingering, answers::now_tick, cpus, has_passthrough, live, needs_packets,
    refresh, running::Running, start, turn::Turn,
};
use crate::{
    admin::{
        Refusal,
        view::{ChangeView, ReloadView},
    },
    config,
    dataplane::{FEW_FLOWS, check_interfaces},
    failure::{Exit, Failure, OrExit as _},
    model::{Forward, Generation, VirtualServer, diff},
    pool::Admin,
    proxy,
};

/// How long a reload waits for a start to end; meanwhile the daemon does nothing else.
const RELOAD_TURN: Duration = Duration::from_secs(5);

/// A file that was read and found good, with what it names.
struct Read {
    generation: Generation,
    certificates: live::Certificates,
    warnings: Vec<String>,
}

impl Daemon {
    /// SIGHUP: nobody waits for the answer, so the log gets it.
    pub(super) async fn reload_by_signal(&mut self) {
        if let Err(refusal) = self.reload(false).await {
            log::error!("reload: {refusal}");
        }
    }

    /// Reads the configuration again and uses it; with `dry_run` only says what that would change.
    pub(super) async fn reload(&mut self, dry_run: bool) -> Result<ReloadView, Refusal> {
        let old = self.shared.running();
        let read = self.read()?;
        let renewed = live::renewed(&old.certificates, &read.certificates);
        let mut view = ReloadView {
            applied: false,
            generation: u64::from(self.shared.plane().generation()),
            changes: changes(&old.generation, &read.generation, &renewed),
            warnings: read.warnings,
        };
        let held = self.shared.plane().flows_max();
        check_fixed(&old.generation, &read.generation, held)?;
        if dry_run {
            return Ok(view);
        }
        // A start meanwhile would take half-made tables over.
        let _turn = Turn::take(&self.options.state, RELOAD_TURN)
            .await
            .or_exit(Exit::Temporary)?;
        if !self.shared.plane().is_owner() {
            return Err(anyhow::anyhow!(
                "another smtplb has taken over; this one is ending. Nothing was changed."
            ))
            .or_exit(Exit::Temporary)
            .map_err(Refusal::from);
        }
        let forwarding = self.addresses.forwarding();
        let tried = read.generation.clone();
        let next = match self.build(&old, read.generation, read.certificates).await {
            Ok(next) => match self.switch(&old, &next).await {
                Ok(()) => Ok(next),
                Err(failure) => Err(failure),
            },
            Err(failure) => Err(failure),
        };
        let next = match next {
            Ok(next) => next,
            Err(failure) => {
                self.addresses.restore_forwarding_since(forwarding);
                self.take_back(&old, &tried).await;
                return Err(failure.into());
            }
        };
        self.settle(&old, &next);
        view.applied = true;
        view.generation = u64::from(self.shared.plane().generation());
        for warning in &view.warnings {
            log::warn!("{warning}");
        }
        log::info!(
            "reloaded: generation {}, {} changes",
            view.generation,
            view.changes.len()
        );
        Ok(view)
    }

    fn read(&self) -> Result<Read, Failure> {
        let (generation, warnings) = config::load(&self.options.config)?;
        let (certificates, faults) = live::load_certificates(&generation);
        if !faults.is_empty() {
            let faults: Vec<_> = faults.iter().map(ToString::to_string).collect();
            return Err(anyhow::anyhow!("{}", faults.join("\n"))).or_exit(Exit::Config);
        }
        check_interfaces(&generation.network).or_exit(Exit::Config)?;
        let mut warnings: Vec<_> = warnings.iter().map(ToString::to_string).collect();
        warnings.extend(live::certificate_warnings(&certificates));
        Ok(Read {
            generation,
            certificates,
            warnings,
        })
    }

    /// Brings the next generation to life beside the old one; new members are probed meanwhile.
    async fn build(
        &mut self,
        old: &Running,
        generation: Generation,
        certificates: live::Certificates,
    ) -> Result<Arc<Running>, Failure> {
        self.lingering.retain(Lingering::goes_on);
        let next = {
            let mut plane = self.shared.plane();
            if has_passthrough(&generation) {
                plane.grow(generation.network.max_flows, self.options.kernel_log)?;
            }
            let numbers = plane.number_beside(&generation, &self.earlier.held())?;
            let roster = super::lock(&self.shared.roster);
            let pools = live::pools(&generation, &numbers, &plane, &roster, Some(old));
            let services = live::services(
                &generation,
                &numbers,
                &plane,
                &pools,
                &certificates,
                &old.sources,
                Some(old),
            )?;
            Arc::new(Running {
                generation,
                numbers,
                pools,
                certificates,
                services,
                sources: old.sources.clone(),
            })
        };
        let known: BTreeSet<u16> = old.members().map(|(_, member)| member.id).collect();
        // A number may have been another member's long ago.
        super::lock(&self.shared.health).retain(|number, _| known.contains(number));
        let targets = live::targets(&next.generation, &next.pools, |number| {
            known.contains(&number)
        });
        let fresh: Vec<u16> = targets
            .iter()
            .map(|target| target.member.id)
            .filter(|number| !known.contains(number))
            .collect();
        self.watches.set(targets);
        start::first_probes(&self.shared, &fresh).await;
        Ok(next)
    }

    /// Adds what the next generation needs, then flips.
    async fn switch(&mut self, old: &Running, next: &Arc<Running>) -> Result<(), Failure> {
        self.addresses.add_all(&next.generation).await?;
        self.addresses.enable_forwarding(&next.generation)?;
        if needs_packets(&next.generation) {
            self.shared.plane().attach(&next.generation)?;
        }
        // Who is accepted just before the flip still finds the old one, and just after it the new one.
        let both = old.services.iter().chain(&next.services).cloned();
        self.shared.services.replace(both);
        if !next.services.is_empty() && start::workers(&self.shared) == 0 {
            let listeners =
                proxy::bind_listeners(&cpus()).context("cannot open the proxy's listeners")?;
            start::start_proxy(&self.shared, listeners)?;
        }
        let workers = start::workers(&self.shared);
        let ready = next.unwatched().filter(|it| it.admin() == Admin::Ready);
        let unwatched: BTreeSet<u16> = ready.map(|member| member.id).collect();
        let mut plane = self.shared.plane();
        plane.apply(
            &next.generation,
            &next.numbers,
            |number| next.takes_new(number) || unwatched.contains(&number),
            workers,
        )?;
        self.shared
            .services
            .set_generation(plane.generation().into());
        for member in next.unwatched() {
            member.set_up(true);
        }
        // A probe may have ended between the two.
        refresh(&self.shared, next, &mut plane);
        drop(plane);
        // What has ended by now is logged by the names that it had.
        self.flow_log.read(&self.shared);
        self.shared.set_running(next.clone());
        Ok(())
    }

    /// After a switch that failed before the flip: what it added goes, what it stopped starts.
    async fn take_back(&mut self, old: &Running, tried: &Generation) {
        self.shared.services.replace(old.services.iter().cloned());
        let targets = live::targets(&old.generation, &old.pools, |_| true);
        self.watches.set(targets);
        let lingering = self.lingering_addresses();
        let pruned = self
            .addresses
            .prune(&old.generation, &lingering, &old.sources.reached())
            .await;
        let mut plane = self.shared.plane();
        let attached = match needs_packets(&old.generation) {
            true => plane.attach(&old.generation),
            false => Ok(()),
        };
        // What the new one had attached must not stay beside; what lingers needs what was there before.
        let attached = match (attached, self.former.is_empty()) {
            (Ok(()), true) => match needs_packets(&old.generation) {
                true => plane.detach_others(tried, &old.generation),
                false => plane.detach_packets(tried),
            },
            (attached, _) => attached,
        };
        for error in [pruned.err(), attached.err()].into_iter().flatten() {
            log::error!("after the failed reload: {error:#}");
        }
    }

    /// After the flip: notes which connections linger, and forgets members that are gone.
    fn settle(&mut self, old: &Arc<Running>, next: &Running) {
        super::lock(&self.shared.roster).forget_others(&next.generation);
        let plane = self.shared.plane();
        for server in &old.generation.virtual_servers {
            let number = old.numbers.virtual_servers[&server.name];
            let mut known = next.generation.virtual_servers.iter();
            let stays = known.find(|server| next.numbers.virtual_servers[&server.name] == number);
            if stays.is_some_and(|stays| !is_passthrough(server) || is_passthrough(stays)) {
                continue;
            }
            let lingering = Lingering {
                address: server.at.address,
                cell: plane.service_cell(number),
                flows_alone: stays.is_some(),
            };
            if !lingering.goes_on() {
                continue;
            }
            match lingering.flows_alone {
                true => log::info!(
                    "virtual server {:?} is a proxy now; {} flows go on until they end",
                    &*server.name,
                    lingering.cell.flows()
                ),
                false => log::info!(
                    "virtual server {:?} takes nothing new; {} connections go on until they end",
                    &*server.name,
                    lingering.cell.active()
                ),
            }
            self.lingering.push(lingering);
        }
        drop(plane);
        // Where the box has no other address, connections come from a virtual one.
        let sources = |generation: &Generation| {
            let servers = generation.virtual_servers.iter();
            let mut addresses = generation.snat_addresses();
            addresses.extend(servers.map(|server| server.at.address));
            addresses
        };
        let gone = &sources(&old.generation) - &sources(&next.generation);
        self.lingering_snat.extend(gone);
        let [before, now] = [&old.generation.network, &next.generation.network];
        let mut left = before
            .client_interfaces
            .iter()
            .chain(&before.server_interfaces);
        let leaves = left.any(|name| {
            !now.client_interfaces.contains(name) && !now.server_interfaces.contains(name)
        });
        self.pruned = false;
        self.earlier.add(old);
        self.former.push(Former {
            generation: old.generation.clone(),
            until: (leaves && has_passthrough(&old.generation)).then(now_tick),
        });
    }

    /// Removes what an earlier generation needed, once no connection needs it any more.
    pub(super) async fn let_go(&mut self) {
        if self.former.is_empty() && self.pruned {
            return;
        }
        let before = self.lingering_addresses().len();
        self.lingering.retain(Lingering::goes_on);
        let running = self.shared.running();
        let used = self.shared.plane().snat_addresses_in_use();
        let sessions = running.sources.in_use();
        self.lingering_snat
            .retain(|address| used.contains(address) || sessions.contains(address));
        let lingering = self.lingering_addresses();
        if before != lingering.len() || !self.pruned {
            let reached = running.sources.reached();
            let pruned = self
                .addresses
                .prune(&running.generation, &lingering, &reached)
                .await;
            // Ways back that sessions still need are looked at again.
            self.pruned = matches!(pruned, Ok(true));
            if let Err(error) = pruned {
                log::error!("cannot remove virtual addresses: {error:#}");
            }
        }
        if !self.lingering.is_empty() || !self.lingering_snat.is_empty() {
            return;
        }
        if let Some(until) = self.former.iter().filter_map(|former| former.until).max() {
            let table = self.shared.plane().flow_table();
            if table.any_older(until) {
                return;
            }
        }
        let mut plane = self.shared.plane();
        for former in self.former.drain(..) {
            let detached = match needs_packets(&running.generation) {
                true => plane.detach_others(&former.generation, &running.generation),
                false => plane.detach_packets(&former.generation),
            };
            if let Err(error) = detached {
                log::error!("cannot detach packet programs: {error:#}");
            }
        }
        drop(plane);
        self.shared
            .services
            .replace(running.services.iter().cloned());
    }

    fn lingering_addresses(&self) -> Vec<IpAddr> {
        let virtual_addresses = self.lingering.iter().map(|lingering| lingering.address);
        virtual_addresses
            .chain(self.lingering_snat.iter().copied())
            .collect()
    }
}

const fn is_passthrough(server: &VirtualServer) -> bool {
    matches!(server.forward, Forward::Passthrough { .. })
}

fn changes(
    old: &Generation,
    new: &Generation,
    renewed: &BTreeSet<crate::model::Name>,
) -> Vec<ChangeView> {
    diff::between(old, new, renewed)
        .into_iter()
        .map(|difference| ChangeView {
            object: difference.object,
            change: difference.change.word().to_owned(),
            details: difference.details,
        })
        .collect()
}

/// What only a start can change is refused by name, and so is a file that was read while it was being written.
///
/// `held`: how many flow records there are.
fn check_fixed(old: &Generation, new: &Generation, held: u64) -> Result<(), Failure> {
    if new.virtual_servers.is_empty() && !old.virtual_servers.is_empty() {
        return Err(anyhow::anyhow!(
            "the file has no virtual server, and {} are served\n  \
             A file that is being written looks like this. Nothing was changed.\n  \
             Reload when it is complete, or stop smtplb if nothing shall be served.",
            old.virtual_servers.len()
        ))
        .or_exit(Exit::Config);
    }
    let after = new.network.max_flows;
    let before = match has_passthrough(old) {
        true => old.network.max_flows,
        // Tables that an earlier generation needed stay as large as they are, in whole chunks.
        false
            if has_passthrough(new)
                && held > u64::from(FEW_FLOWS)
                && held != u64::from(after).next_multiple_of(u64::from(CHUNK)) =>
        {
            held as u32
        }
        false => after,
    };
    if before != after {
        return Err(anyhow::anyhow!(
            "network max_flows: {before} → {after} cannot change while the kernel plane is up\n  \
             The tables of flows get their size when the kernel plane starts. Nothing was changed.\n  \
             Set max_flows = {before} again, or stop and start: systemctl stop smtplb && systemctl start smtplb."
        ))
        .or_exit(Exit::Config);
    }
    Ok(())
}
