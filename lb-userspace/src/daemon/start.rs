//! Start: from a loaded kernel plane to one that serves.

use std::{collections::BTreeSet, net::IpAddr, path::Path, sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio::{
    net::UnixListener,
    sync::mpsc,
    time::{Instant, interval},
};

use super::{
    Lingering, RunOptions, cpus, live, needs_packets,
    orders::{self, Order},
    refresh,
    roster::Roster,
    running::{Running, Shared, lock},
};
use crate::{
    admin,
    dataplane::{Addresses, KernelPlane},
    failure::Failure,
    model::{Forward, Generation},
    monitor::Watches,
    proxy::{self, Proxy, Sources, WorkerListeners},
    telemetry::lines::Lines,
};

/// How long the start waits for the first probes: a good member answers sooner.
const FIRST_PROBES: Duration = Duration::from_secs(2);
/// Flows looked at for addresses that go on after a start: those of prefixes may be many.
const LEFT_BEHIND: usize = 4096;

pub(super) type Started = (Arc<Shared>, Watches, mpsc::Receiver<Order>, UnixListener);

/// Everything from a loaded plane to one that serves. What can fail comes before the flip: until then, an earlier daemon
/// that still lives goes on undisturbed.
pub(super) async fn start(
    options: &RunOptions,
    generation: Generation,
    certificates: live::Certificates,
    plane: KernelPlane,
    addresses: &mut Addresses,
    lines: Lines,
) -> Result<Started, Failure> {
    let numbers = plane.number(&generation)?;
    if !plane.other_owner().is_some_and(super::is_alive) {
        plane.forget_sessions();
    }
    let roster = Roster::load(&options.state);
    let pools = live::pools(&generation, &numbers, &plane, &roster, None);
    let sources = Arc::new(Sources::default());
    let services = live::services(
        &generation,
        &numbers,
        &plane,
        &pools,
        &certificates,
        &sources,
        None,
    )?;
    let listeners = match services.is_empty() {
        true => Vec::new(),
        false => proxy::bind_listeners(&cpus()).context("cannot open the proxy's listeners")?,
    };
    let targets = live::targets(&generation, &pools, |_| false);
    let running = Running {
        generation,
        numbers,
        pools,
        certificates,
        services,
        sources,
    };
    let (sender, orders) = mpsc::channel(orders::WAITING);
    let shared = Arc::new(Shared::new(running, plane, roster, sender, lines));
    let mut watches = Watches::new(shared.clone());
    let numbers: Vec<u16> = targets.iter().map(|target| target.member.id).collect();
    watches.set(targets);
    first_probes(&shared, &numbers).await;
    let before = {
        let plane = shared.plane();
        plane.adopted().then(|| plane.attached())
    };
    let begun = begin(options, &shared, &mut watches, addresses, listeners).await;
    if let (Err(_), Some(before)) = (&begun, before) {
        let running = shared.running();
        let restored = shared.plane().restore(&before, &running.generation);
        if let Err(error) = restored {
            log::error!("after the failed start: {error:#}");
        }
    }
    Ok((shared, watches, orders, begun?))
}

/// From where the box changes to where this daemon serves.
async fn begin(
    options: &RunOptions,
    shared: &Arc<Shared>,
    watches: &mut Watches,
    addresses: &mut Addresses,
    listeners: Vec<WorkerListeners>,
) -> Result<UnixListener, Failure> {
    let no_socket = || format!("cannot open the admin socket {}", options.admin.display());
    let (listener, place) = admin::server::listen_aside(&options.admin).with_context(no_socket)?;
    let listener = UnixListener::from_std(listener).with_context(no_socket)?;
    let running = shared.running();
    addresses.add_all(&running.generation).await?;
    addresses.enable_forwarding(&running.generation)?;
    let tagged = addresses.tagged_interfaces().await;
    shared.plane().note_tagged(tagged)?;
    if needs_packets(&running.generation) {
        shared.plane().attach(&running.generation)?;
    }
    heed_roster(shared, &options.state, watches);
    apply(shared, listeners)?;
    // An earlier daemon answers until here.
    if let Err(error) = place.take() {
        log::error!("{}: {error}", no_socket());
    }
    lock(&shared.roster).forget_others(&running.generation);
    log::debug!("configuration {} is in use", options.config.display());
    Ok(listener)
}

pub(super) async fn first_probes(shared: &Shared, numbers: &[u16]) {
    let deadline = Instant::now() + FIRST_PROBES;
    let mut beat = interval(Duration::from_millis(5));
    while shared.unprobed(numbers) > 0 && Instant::now() < deadline {
        beat.tick().await;
    }
}

/// What was said of members to the earlier daemon while this one started holds here, too.
fn heed_roster(shared: &Shared, state: &Path, watches: &mut Watches) {
    let running = shared.running();
    let roster = Roster::load(state);
    let mut changed = false;
    for (pool, member) in running.members() {
        let admin = roster.get(pool, &member.name).admin;
        changed |= member.admin() != admin;
        member.set_admin(admin);
    }
    *lock(&shared.roster) = roster;
    if changed {
        let probed: Vec<u16> = lock(&shared.health).keys().copied().collect();
        let known = |number: u16| probed.contains(&number);
        watches.set(live::targets(&running.generation, &running.pools, known));
    }
}

/// What an earlier daemon's flows still need: those of virtual servers that this configuration does not pass through.
pub(super) fn left_behind(shared: &Shared) -> Vec<Lingering> {
    let running = shared.running();
    let numbers = &running.numbers.virtual_servers;
    let servers = || running.generation.virtual_servers.iter();
    let known: Vec<u16> = servers().map(|server| numbers[&server.name]).collect();
    let passed: Vec<u16> = servers()
        .filter(|server| matches!(server.forward, Forward::Passthrough { .. }))
        .map(|server| numbers[&server.name])
        .collect();
    let plane = shared.plane();
    let flows = plane.flow_table().all().filter(|flow| !flow.phase.ended());
    let left: BTreeSet<(u16, IpAddr)> = flows
        .filter(|flow| !passed.contains(&flow.virtual_server))
        .map(|flow| (flow.virtual_server, flow.route.address().0.to_ip()))
        .take(LEFT_BEHIND)
        .collect();
    left.into_iter()
        .map(|(number, address)| Lingering {
            address,
            cell: plane.service_cell(number),
            flows_alone: known.contains(&number),
        })
        .filter(Lingering::goes_on)
        .collect()
}

/// Builds the tables, starts the proxy, takes the steering over and flips. What does not fit is found before an earlier
/// daemon's listeners are steered to no more.
fn apply(shared: &Arc<Shared>, listeners: Vec<WorkerListeners>) -> Result<(), Failure> {
    let running = shared.running();
    let (generation, numbers) = (&running.generation, &running.numbers);
    shared.services.replace(running.services.iter().cloned());
    let built = shared
        .plane()
        .build(generation, numbers, listeners.len() as u32)?;
    start_proxy(shared, listeners)?;
    let mut plane = shared.plane();
    plane.flip(
        generation,
        numbers,
        |number| running.takes_new(number),
        built,
    )?;
    shared.services.set_generation(plane.generation().into());
    // A probe may have ended between the two.
    refresh(shared, &running, &mut plane);
    Ok(())
}

/// Starts the proxy's workers, if there are to be any, and steers to them.
pub(super) fn start_proxy(shared: &Shared, listeners: Vec<WorkerListeners>) -> Result<(), Failure> {
    let handles: Vec<_> = listeners
        .iter()
        .map(|worker| {
            Ok((
                worker.v4.try_clone()?,
                worker.v6.as_ref().map(|v6| v6.try_clone()).transpose()?,
            ))
        })
        .collect::<std::io::Result<_>>()
        .context("cannot share the proxy's listeners")?;
    if !listeners.is_empty() {
        let proxy = Proxy::start(
            shared.services.clone(),
            listeners,
            Arc::new(shared.lines.clone()),
        )
        .context("cannot start the proxy")?;
        *lock(&shared.proxy) = Some(proxy);
    }
    shared.plane().steer(&handles)?;
    Ok(())
}

pub(super) fn workers(shared: &Shared) -> u32 {
    lock(&shared.proxy)
        .as_ref()
        .map_or(0, |proxy| proxy.workers() as u32)
}
