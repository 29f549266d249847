//! The workers: one thread per core with its own runtime and listeners, so that a session stays on
//! the core that its packets were steered to.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::thread::{CpuSet, sched_setaffinity};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Builder,
    sync::watch,
    time::{sleep, timeout},
};

use super::{
    Services,
    crowd::Crowd,
    events::Events,
    listener::WorkerListeners,
    live::Live,
    orders::{Control, Orders},
    session::{Context, serve},
};
use crate::{admin::view::SessionView, telemetry::session::SessionSink};

/// How long accepting rests when the machine is short of something, first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// What sessions get to end after they were cut, and the last of all to say goodbye.
const CUT: Duration = Duration::from_millis(500);

/// What a drain came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DrainReport {
    /// Sessions that ended in their own time.
    pub finished: usize,
    /// Sessions that the deadline or a [`Cutter`] cut.
    pub cut: usize,
}

/// The proxy plane at work.
pub struct Proxy {
    control: watch::Sender<Orders>,
    workers: Vec<JoinHandle<()>>,
    live: Vec<Arc<Live>>,
    events: Arc<Events>,
    /// Sessions that a [`Cutter`] has cut.
    cut: Arc<AtomicUsize>,
    /// Closes when the last worker has ended.
    ended: mpsc::Receiver<()>,
}

impl Proxy {
    /// Starts a worker for each entry, pinned to its core.
    ///
    /// # Errors
    /// A thread, a runtime or a listener cannot be set up; workers that started stop again.
    pub fn start(
        services: Arc<Services>,
        listeners: Vec<WorkerListeners>,
        log: Arc<dyn SessionSink>,
    ) -> io::Result<Self> {
        let control = watch::Sender::new(Orders::none());
        let (alive, ended) = mpsc::channel();
        let events = Arc::new(Events::default());
        let crowd = Arc::new(Crowd::default());
        let mut proxy = Self {
            control,
            workers: Vec::new(),
            live: Vec::new(),
            events,
            cut: Arc::default(),
            ended,
        };
        for listeners in listeners {
            let live = Arc::new(Live::default());
            let context = Context {
                live: live.clone(),
                services: services.clone(),
                events: proxy.events.clone(),
                log: log.clone(),
                control: proxy.control.subscribe(),
                crowd: crowd.clone(),
            };
            let worker = Worker::new(listeners, services.clone(), context)?;
            let alive = alive.clone();
            let run = move || {
                worker.run();
                drop(alive);
            };
            let name = format!("smtplb-{}", proxy.workers.len());
            proxy
                .workers
                .push(thread::Builder::new().name(name).spawn(run)?);
            proxy.live.push(live);
        }
        Ok(proxy)
    }

    /// Takes what waits in the accept queues, then closes the listeners.
    pub fn stop_accepting(&self) {
        self.raise(Control::StopAccepting);
    }

    /// What ends a drain before its deadline, from another thread.
    pub fn cutter(&self) -> Cutter {
        Cutter {
            control: self.control.clone(),
            live: self.live.clone(),
            cut: self.cut.clone(),
        }
    }

    /// Ends every session: between messages at once with 421 4.3.2, within one when it is over, or
    /// at the deadline. Blocks until the workers have ended.
    pub fn drain(mut self, deadline: Duration) -> DrainReport {
        let sessions = self.count();
        self.raise(Control::Drain);
        let cut = match self.ended.recv_timeout(deadline) {
            Err(mpsc::RecvTimeoutError::Timeout) => self.count(),
            _ => self.cut.load(Relaxed),
        };
        self.raise(Control::Cut);
        for worker in self.workers.drain(..) {
            // A worker that panicked has ended, too.
            let _ = worker.join();
        }
        DrainReport {
            finished: sessions.saturating_sub(cut),
            cut,
        }
    }

    /// Ends the sessions that a member has now, and no later one: with [`Control::Drain`] between messages, with
    /// [`Control::Cut`] at once; the client is told 421 4.3.2.
    pub fn end_member(&self, member: u16, control: Control) {
        self.control
            .send_modify(|orders| orders.give(member, control));
    }

    /// The sessions of all workers, in no order.
    pub fn sessions(&self) -> Vec<SessionView> {
        self.live.iter().flat_map(|live| live.views()).collect()
    }

    /// What happened so far, by the names in [`super::events`] and the words of [`crate::smtp::end::End`].
    pub fn events(&self) -> BTreeMap<String, u64> {
        self.events.snapshot()
    }

    /// How many workers there are.
    pub fn workers(&self) -> usize {
        self.workers.len()
    }

    fn raise(&self, control: Control) {
        self.control
            .send_if_modified(|orders| orders.raise(control));
    }

    fn count(&self) -> usize {
        count(&self.live)
    }
}

/// Cuts the sessions of a [`Proxy`].
pub struct Cutter {
    control: watch::Sender<Orders>,
    live: Vec<Arc<Live>>,
    cut: Arc<AtomicUsize>,
}

impl Cutter {
    /// Ends every session now; the client is told 421 4.3.2.
    pub fn cut(self) {
        self.cut.store(count(&self.live), Relaxed);
        self.control
            .send_if_modified(|orders| orders.raise(Control::Cut));
    }
}

fn count(live: &[Arc<Live>]) -> usize {
    live.iter().map(|live| live.count()).sum()
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.raise(Control::Cut);
    }
}

/// One thread's world.
struct Worker {
    cpu: usize,
    runtime: tokio::runtime::Runtime,
    listeners: Vec<TcpListener>,
    services: Arc<Services>,
    context: Arc<Context>,
}

impl Worker {
    fn new(
        listeners: WorkerListeners,
        services: Arc<Services>,
        context: Context,
    ) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let guard = runtime.enter();
        let WorkerListeners { cpu, v4, v6 } = listeners;
        let listeners = [Some(v4), v6]
            .into_iter()
            .flatten()
            .map(TcpListener::from_std);
        let listeners = listeners.collect::<io::Result<_>>()?;
        drop(guard);
        Ok(Self {
            cpu,
            runtime,
            listeners,
            services,
            context: Arc::new(context),
        })
    }

    fn run(self) {
        let mut cpus = CpuSet::new();
        if self.cpu < CpuSet::MAX_CPU {
            cpus.set(self.cpu);
            if let Err(error) = sched_setaffinity(None, &cpus) {
                log::warn!(
                    "a proxy worker cannot stay on core {}: {error}; it serves from any",
                    self.cpu
                );
            }
        }
        let Self {
            runtime,
            listeners,
            services,
            context,
            ..
        } = self;
        runtime.block_on(async move {
            let accept =
                |listener| tokio::spawn(accept(listener, services.clone(), context.clone()));
            let accepting: Vec<_> = listeners.into_iter().map(accept).collect();
            let mut control = context.control.clone();
            // A sender that is gone means the same as the last word it could have said.
            let _ = control
                .wait_for(|orders| orders.all >= Control::Drain)
                .await;
            for task in accepting {
                // What waited in the queues is served; a task that panicked took its listener along.
                let _ = task.await;
            }
            tokio::select! {
                () = context.live.emptied() => {}
                _ = control.wait_for(|orders| orders.all == Control::Cut) => {
                    let _ = timeout(CUT, context.live.emptied()).await;
                }
            }
            // Who does not hear the last words would say again what was taken.
            let _ = timeout(CUT, context.live.parted()).await;
        });
    }
}

/// Takes connections until told to stop, and then those that wait already.
async fn accept(listener: TcpListener, services: Arc<Services>, context: Arc<Context>) {
    let mut control = context.control.clone();
    let mut pause = PAUSE.0;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = control.wait_for(|orders| orders.all >= Control::StopAccepting) => break,
        };
        match accepted {
            Ok((tcp, _)) => {
                pause = PAUSE.0;
                welcome(tcp, &services, &context);
            }
            Err(error) if concerns_one_connection(&error) => {}
            Err(error) => {
                context.events.accept_paused.fetch_add(1, Relaxed);
                log::warn!("accepting pauses for {pause:?}: {error}");
                sleep(pause).await;
                pause = (pause * 2).min(PAUSE.1);
            }
        }
    }
    let Ok(listener) = listener.into_std() else {
        return;
    };
    let until = Instant::now() + PAUSE.1;
    while let Ok((tcp, _)) = listener.accept() {
        let tcp = tcp
            .set_nonblocking(true)
            .and_then(|()| TcpStream::from_std(tcp));
        if let Ok(tcp) = tcp {
            welcome(tcp, &services, &context);
        }
        if Instant::now() > until {
            break;
        }
    }
}

fn welcome(tcp: TcpStream, services: &Services, context: &Arc<Context>) {
    let (Ok(local), Ok(peer)) = (tcp.local_addr(), tcp.peer_addr()) else {
        return;
    };
    match services.find(local) {
        Some(service) => {
            let ends = (super::canonical(local), super::canonical(peer));
            let generation = services.generation();
            tokio::spawn(serve(context.clone(), service, generation, tcp, ends));
        }
        None => _ = context.events.no_virtual_server.fetch_add(1, Relaxed),
    }
}

/// The client was faster than we, or the network told it so: the next one is fine.
fn concerns_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted
    )
}
