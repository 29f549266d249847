//! Real sockets on loopback, members that follow a script.

use std::{io::Read, net::SocketAddr, sync::Mutex};

use lb_common::stats::TrafficCell;
use tokio::{
    net::TcpListener,
    sync::mpsc,
    task::JoinSet,
    time::{sleep, timeout},
};

use super::*;
use crate::{
    model::{self, Monitor},
    pool::LiveMember,
};

/// Longer than anything here takes, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the observer heard: the probe's result, did it change the member, and was the member up by then.
type Heard = (Health, bool, bool);

struct Ear(Mutex<mpsc::UnboundedSender<Heard>>);

impl Observer for Ear {
    fn probed(&self, target: &Target, health: &Health, changed: bool) {
        let heard = (health.clone(), changed, target.member.is_up());
        let _ = self.0.lock().unwrap().send(heard);
    }
}

fn target(address: SocketAddr, up: bool, interval: u64, limit: u64, fall: u32) -> Target {
    let cell = Box::leak(Box::new(TrafficCell::default()));
    Target {
        pool: "mx".into(),
        member: Arc::new(LiveMember::new("mx1".into(), address, 1, up, cell)),
        monitor: Arc::new(Monitor {
            name: "mx".into(),
            probe: model::Probe::Smtp {
                helo: "lb.example.org".into(),
            },
            interval: Duration::from_millis(interval),
            timeout: Duration::from_millis(limit),
            rise: 1,
            fall,
        }),
        known: None,
    }
}

/// Starts the monitor; the returned set stops it when dropped.
fn start(targets: Vec<Target>) -> (mpsc::UnboundedReceiver<Heard>, JoinSet<()>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let mut running = JoinSet::new();
    running.spawn(async move {
        let mut watches = Watches::new(Arc::new(Ear(Mutex::new(sender))));
        watches.set(targets);
        std::future::pending().await
    });
    (receiver, running)
}

async fn next(heard: &mut mpsc::UnboundedReceiver<Heard>) -> Heard {
    timeout(PATIENCE, heard.recv())
        .await
        .expect("a result in time")
        .expect("a running monitor")
}

/// The first verdict on a member that treats each connection like this.
async fn verdict<F>(limit: u64, serve: impl Fn(TcpStream) -> F + Send + 'static) -> Health
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = target(listener.local_addr().unwrap(), true, 3_600_000, limit, 1);
    let (mut heard, mut running) = start(vec![target]);
    running.spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            serve(stream).await;
        }
    });
    let (health, changed, up) = next(&mut heard).await;
    assert_eq!(up, health.up, "the first result decides");
    assert_eq!(changed, !health.up, "it started as up");
    health
}

/// A member that does what a mail server does, one byte at a time where asked.
async fn good_server(mut stream: TcpStream, pause: Duration) {
    let mut lines = Vec::new();
    for (answer, command) in [
        ("220 mx\r\n", "EHLO lb.example.org\r\n"),
        ("250 mx\r\n", "QUIT\r\n"),
        ("221 bye\r\n", ""),
    ] {
        for byte in answer.bytes() {
            if stream.write_all(&[byte]).await.is_err() {
                return;
            }
            if !pause.is_zero() {
                sleep(pause).await;
            }
        }
        lines.clear();
        while lines.len() < command.len()
            && stream
                .read_buf(&mut lines)
                .await
                .is_ok_and(|length| length > 0)
        {}
        assert_eq!(lines, command.as_bytes());
    }
}

#[tokio::test]
async fn a_mail_server_is_up() {
    let health = verdict(10_000, |stream| good_server(stream, Duration::ZERO)).await;
    assert!(
        health.up && health.reason.starts_with("greeting 220 in "),
        "{health:?}"
    );
}

#[tokio::test]
async fn a_slow_mail_server_is_up() {
    let health = verdict(20_000, |stream| {
        good_server(stream, Duration::from_millis(5))
    })
    .await;
    assert!(health.up, "{health:?}");
}

#[tokio::test]
async fn a_silent_member_is_down_after_the_limit() {
    let health = verdict(150, |stream| async {
        sleep(PATIENCE).await;
        drop(stream);
    })
    .await;
    assert_eq!(health.reason, "no greeting within 150 ms");
}

#[tokio::test]
async fn a_member_that_trickles_past_the_limit_is_down() {
    let health = verdict(150, |mut stream| async move {
        while stream.write_all(b"2").await.is_ok() {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(health.reason, "no greeting within 150 ms");
}

#[tokio::test]
async fn a_refusing_greeting_is_down() {
    let health = verdict(10_000, |mut stream| async move {
        stream.write_all(b"554 no service\r\n").await.unwrap();
        sleep(Duration::from_millis(200)).await;
    })
    .await;
    assert_eq!(health.reason, "greeting: 554 no service");
}

#[tokio::test]
async fn an_endless_banner_is_cut_off() {
    let health = verdict(10_000, |mut stream| async move {
        while stream.write_all(&[b'2'; 4096]).await.is_ok() {}
    })
    .await;
    assert!(!health.up);
    assert!(health.reason.starts_with("greeting: "), "{health:?}");
}

#[tokio::test]
async fn a_closed_port_is_down_until_it_opens() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let (mut heard, mut running) = start(vec![target(address, true, 50, 10_000, 3)]);
    let (health, changed, up) = next(&mut heard).await;
    assert_eq!(
        (&*health.reason, changed, up),
        ("connect refused", true, false)
    );
    let (_, changed, up) = next(&mut heard).await;
    assert_eq!((changed, up), (false, false), "no news");
    let listener = TcpListener::bind(address).await.unwrap();
    running.spawn(async move {
        // Serves twice, then the port is closed again.
        for _ in 0..2 {
            let (stream, _) = listener.accept().await.unwrap();
            good_server(stream, Duration::ZERO).await;
        }
    });
    let mut history = Vec::new();
    while history.last() != Some(&(false, true, false)) {
        let (health, changed, up) = next(&mut heard).await;
        history.push((health.up, changed, up));
    }
    history.retain(|heard| *heard != (false, false, false));
    assert_eq!(
        history,
        [
            (true, true, true),
            (true, false, true),
            (false, false, true),
            (false, false, true),
            (false, true, false),
        ],
        "up at once, down after three"
    );
}

#[tokio::test]
async fn one_member_never_has_two_probes_and_all_members_are_watched() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let slow = target(listener.local_addr().unwrap(), true, 10, 100, 1);
    let closed = target("127.0.0.1:9".parse().unwrap(), true, 10, 100, 1);
    let (mut heard, mut running) = start(vec![slow, closed]);
    running.spawn(async move {
        let mut last: Option<std::net::TcpStream> = None;
        while let Ok((stream, _)) = listener.accept().await {
            // Loopback delivers in order: whoever was here before has closed already.
            if let Some(mut last) = last.replace(stream.into_std().unwrap()) {
                assert_eq!(
                    last.read(&mut [0; 16]).unwrap(),
                    0,
                    "closed before the next came"
                );
            }
        }
    });
    let (mut silent, mut refused) = (0, 0);
    while silent < 3 || refused < 3 {
        match &*next(&mut heard).await.0.reason {
            "no greeting within 100 ms" => silent += 1,
            "connect refused" => refused += 1,
            other => panic!("{other}"),
        }
    }
    assert!(running.try_join_next().is_none(), "nobody has complained");
    drop(running);
    let ended = async { while heard.recv().await.is_some() {} };
    assert!(timeout(PATIENCE, ended).await.is_ok(), "stops when dropped");
}
