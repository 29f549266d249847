//! What is heard while a session waits for a member, or for a handshake.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc,
    },
    thread,
    time::Duration,
};

use futures_util::future::join;
use socket2::SockRef;
use tokio::sync::{Notify, watch};

use super::peers::{
    Client, Ends, Kind, Lab, Member, PATIENCE, Script, Server, Setup, good, like, until,
};
use crate::{
    model::{Method, ServerTerms, StartTls, Terms, Verify},
    pool::{LiveMember, LivePool},
    proxy::{
        Control, MemberSecurity, Orders, Service,
        events::Events,
        live::Live,
        session::{Context, serve},
    },
    smtp::{end::End, phase::Phase, timeouts::Timeouts},
    tls::{MemberTls, load_roots},
};

const STOP: &[u8] = b"421 4.3.2 Service is shutting down\r\n";
const NOBODY: &[u8] = b"421 4.3.2 No mail server available\r\n";
const PLAIN: Server = |_| MemberSecurity::None;
const IMPLICIT: Server = |pair| MemberSecurity::Implicit(member_tls(pair));
const STARTTLS: Server = |pair| MemberSecurity::StartTls(member_tls(pair));

fn member_tls(pair: &crate::tls::tests::Pair) -> Arc<MemberTls> {
    let roots = load_roots(Some(&pair.path("chain.pem"))).unwrap();
    let terms = ServerTerms {
        verify: Verify::Full { roots: None },
        name: None,
        certificate: None,
    };
    Arc::new(MemberTls::new(&terms, Some(&roots), None).unwrap())
}

/// Says nothing; reports that it is connected, and the end of that.
fn mute(member: &mut Member) {
    let _ = member.log.send(b"here".to_vec());
    while member.line().is_some() {}
    let _ = member.log.send(b"gone".to_vec());
}

/// Greets and agrees to TLS, and then says nothing.
fn no_handshake(member: &mut Member) {
    member.say("220 late ESMTP\r\n");
    member.line();
    member.say("250-late\r\n250 STARTTLS\r\n");
    member.line();
    member.say("220 go\r\n");
    mute(member);
}

/// With members that may take their time.
fn lab(kind: Kind, server: Server, members: &[Script]) -> Lab {
    let setup = Setup {
        kind,
        server,
        timeouts: patient(),
        ..Setup::default()
    };
    Lab::made(setup, members)
}

fn patient() -> Timeouts {
    Timeouts {
        member_handshake: 3 * PATIENCE,
        handshake: 3 * PATIENCE,
        ..Timeouts::DEFAULT
    }
}

/// A session's phase says where it will be before it is there.
fn until_here(lab: &Lab, phase: &str) {
    assert_eq!(lab.seen(), "here");
    until_phase(lab, phase);
}

fn until_phase(lab: &Lab, phase: &str) {
    until(phase, || {
        let sessions = lab.proxy.as_ref().unwrap().sessions();
        sessions.first().is_some_and(|it| it.phase == phase)
    });
}

#[test]
fn a_stop_does_not_wait_for_members_on_their_way() {
    for (server, member, phase) in [
        (IMPLICIT, mute as Script, "connect"),
        (STARTTLS, no_handshake, "handshake"),
    ] {
        for early in ["", "EHLO c\r\n"] {
            let mut lab = lab(Kind::Plain, server, &[member]);
            let mut client = lab.connect();
            if phase == "handshake" {
                assert_eq!(client.reply(), "220 late ESMTP\r\n");
            }
            client.send(early);
            until_here(&lab, phase);
            let report = lab.proxy.take().unwrap().drain(PATIENCE);
            assert_eq!((report.finished, report.cut), (1, 0), "{phase}");
            assert_eq!(client.rest(), STOP, "{phase}");
            let end = lab.end();
            assert_eq!((end.end, end.phase.as_str()), (End::Drained, phase));
            assert_eq!(lab.seen(), "gone");
        }
    }
}

#[test]
fn a_member_in_maintenance_frees_who_shakes_hands_with_it() {
    let lab = lab(Kind::Plain, STARTTLS, &[no_handshake]);
    let mut client = lab.connect();
    client.reply();
    until_here(&lab, "handshake");
    lab.proxy.as_ref().unwrap().end_member(0, Control::Cut);
    assert_eq!(client.rest(), STOP);
}

#[test]
fn a_stop_does_not_wait_for_clients_that_shake_hands() {
    let detecting = Terms {
        detect_implicit_tls: Some(PATIENCE),
        ..Terms::default()
    };
    for (kind, terms, hello) in [
        (Kind::Implicit, Terms::default(), ""),
        (Kind::StartTls(StartTls::Require), detecting, "\x16"),
    ] {
        let mut lab = Lab::on(kind, &[good], &terms);
        let mut client = lab.connect();
        client.send(hello);
        until_phase(&lab, "handshake");
        let report = lab.proxy.take().unwrap().drain(PATIENCE);
        assert_eq!((report.finished, report.cut), (1, 0));
        assert_eq!(client.rest(), b"", "words in clear would be no TLS");
        let end = lab.end();
        assert_eq!((end.end, end.last_code), (End::Drained, 0));
    }
}

/// A client that is told nothing at the border might come back without TLS.
#[test]
fn a_stop_waits_for_the_border_and_a_cut_does_not() {
    for cut in [false, true] {
        let kind = Kind::StartTls(StartTls::Allow);
        let mut lab = lab(kind, |_| MemberSecurity::None, &[good]);
        let mut client = lab.connect();
        client.reply();
        client.expect("EHLO c", "250");
        client.expect("STARTTLS", "220 ");
        until_phase(&lab, "handshake");
        let proxy = lab.proxy.take().unwrap();
        let cutter = proxy.cutter();
        let drain = thread::spawn(move || proxy.drain(PATIENCE));
        if cut {
            cutter.cut();
            assert_eq!(client.rest(), b"");
            drain.join().unwrap();
        } else {
            let mut client = lab.secure(client);
            assert_eq!(client.reply().as_bytes(), STOP);
            assert_eq!(client.rest(), b"");
            assert_eq!(drain.join().unwrap().cut, 0);
        }
        assert_eq!(lab.end().end, End::Drained);
    }
}

#[test]
fn who_hangs_up_is_sought_no_member() {
    for (server, member, phase) in [
        (IMPLICIT, mute as Script, "connect"),
        (STARTTLS, no_handshake, "handshake"),
    ] {
        for reset in [false, true] {
            let lab = lab(Kind::Plain, server, &[member]);
            let client = lab.connect();
            until_here(&lab, phase);
            if reset {
                SockRef::from(&client.stream)
                    .set_linger(Some(Duration::ZERO))
                    .unwrap();
            }
            drop(client);
            let end = lab.end();
            assert_eq!((end.end, end.phase.as_str()), (End::ClientClosed, phase));
            assert_eq!(lab.seen(), "gone");
            until("the place to be free", || lab.cell.active() == 0);
        }
    }
    // An alert is a goodbye, too.
    let lab = lab(Kind::Implicit, IMPLICIT, &[mute]);
    let mut client = lab.secure(lab.connect());
    let stream = &mut client.stream;
    stream.conn.complete_io(&mut stream.sock).unwrap();
    until_here(&lab, "connect");
    stream.conn.send_close_notify();
    stream.conn.complete_io(&mut stream.sock).unwrap();
    assert_eq!(lab.end().end, End::ClientClosed);
    assert_eq!(lab.seen(), "gone");
}

#[test]
fn who_hangs_up_does_not_take_along_what_others_wait_for() {
    let setup = Setup {
        kind: Kind::StartTls(StartTls::Allow),
        plaintext: Some(&[mute]),
        ..Setup::default()
    };
    let lab = Lab::made(setup, &[good]);
    let client = lab.connect();
    assert_eq!(lab.seen(), "here");
    drop(client);
    assert_eq!(lab.end().end, End::ClientClosed);
    assert!(lab.seen.try_recv().is_err(), "it is still asked");
    let mut client = lab.connect();
    assert_eq!(client.reply(), "220 good ESMTP\r\n");
    assert_eq!(lab.seen(), "gone");
    assert!(lab.seen.try_recv().is_err(), "it was asked once");
}

#[test]
fn who_has_said_all_and_closes_its_side_is_served() {
    static GO: AtomicBool = AtomicBool::new(false);
    fn late(member: &mut Member) {
        until("the client to close its side", || GO.load(Relaxed));
        super::peers::implicit(member);
    }
    let lab = lab(Kind::Plain, IMPLICIT, &[late]);
    let mut client = lab.connect();
    until_phase(&lab, "connect");
    client.send("HELO c\r\nQUIT\r\n");
    client.stream.shutdown(Shutdown::Write).unwrap();
    GO.store(true, Relaxed);
    assert_eq!(client.rest(), b"220 good ESMTP\r\n250 ok\r\n221 bye\r\n");
    assert_eq!(lab.end().end, End::Quit);
}

/// Takes the commands and of the chunk behind them nothing, and goes on to answer.
fn talks_and_takes_nothing(member: &mut Member) {
    member.say("220 slow ESMTP\r\n");
    member.line();
    member.say("250-slow\r\n250-CHUNKING\r\n250 PIPELINING\r\n");
    while member.line().is_some_and(|line| !line.starts_with(b"BDAT")) {}
    let (_kept, pause) = mpsc::channel::<()>();
    for _ in 0..REPLIES {
        let _ = pause.recv_timeout(Duration::from_millis(50));
        if !member.say("250 ok\r\n") {
            return;
        }
    }
    mute(member);
}

const REPLIES: usize = 60;

#[test]
fn a_member_that_takes_nothing_is_not_excused_by_a_client_that_does() {
    let setup = Setup {
        timeouts: Timeouts {
            send: Duration::from_millis(300),
            ..Timeouts::DEFAULT
        },
        ..Setup::default()
    };
    let lab = Lab::made(setup, &[talks_and_takes_nothing]);
    let mut client = lab.connect();
    client.reply();
    client.expect("EHLO c", "250");
    let commands = "RCPT TO:<c@d>\r\n".repeat(REPLIES);
    client.send(format!("{commands}BDAT 99999999 LAST\r\n"));
    let mut writer = client.stream.try_clone().unwrap();
    let writing = thread::spawn(move || {
        let block = [b'x'; 1 << 16];
        while writer.write_all(&block).is_ok() {}
    });
    let heard = String::from_utf8(client.rest()).unwrap();
    assert_eq!(lab.end().end, End::SendTimeout);
    let replies = heard.matches("250 ok\r\n").count();
    assert!(replies < REPLIES, "it was waited for all its replies");
    writing.join().unwrap();
}

/// One session on a runtime of its own.
struct Alone {
    runtime: tokio::runtime::Runtime,
    ends: Ends,
    events: Arc<Events>,
    live: Arc<Live>,
    orders: watch::Sender<Orders>,
    /// Makes its task panic.
    fault: Arc<Notify>,
}

impl Alone {
    fn serve(lab: &Lab) -> (Self, Client<TcpStream>) {
        let service = lab.services.find(lab.address).unwrap();
        let alone = Self {
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap(),
            ends: Ends::default(),
            events: Arc::default(),
            live: Arc::default(),
            orders: watch::Sender::new(Orders::none()),
            fault: Arc::default(),
        };
        let context = Arc::new(Context {
            live: alone.live.clone(),
            services: Arc::default(),
            events: alone.events.clone(),
            log: Arc::new(alone.ends.clone()),
            control: alone.orders.subscribe(),
            crowd: Arc::default(),
        });
        let fault = alone.fault.clone();
        let client = alone.runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let client = lab.connect_to(listener.local_addr().unwrap());
            let (tcp, peer) = listener.accept().await.unwrap();
            let local = tcp.local_addr().unwrap();
            let fault = async move {
                fault.notified().await;
                panic!("a test wants it");
            };
            tokio::spawn(join(serve(context, service, 1, tcp, (local, peer)), fault));
            client
        });
        (alone, client)
    }

    fn until(&self, mut done: impl FnMut() -> bool) {
        let waited = async {
            while !done() {
                tokio::task::yield_now().await;
            }
        };
        let waited = async { tokio::time::timeout(PATIENCE, waited).await };
        assert!(self.runtime.block_on(waited).is_ok(), "waited too long");
    }
}

#[test]
fn a_session_that_is_dropped_is_reported_once() {
    let quiet = ("", "");
    let greeted = ("NOOP\r\n", "220 good ESMTP\r\n250 ok\r\n");
    let in_data = ("DATA\r\n", "220 good ESMTP\r\n354 go\r\n");
    let implicit = super::peers::implicit as Script;
    for (kind, server, member, (sent, heard), end, phase) in [
        (
            Kind::Plain,
            PLAIN,
            good as Script,
            greeted,
            End::Drained,
            Phase::Command,
        ),
        (
            Kind::Plain,
            IMPLICIT,
            implicit,
            greeted,
            End::Drained,
            Phase::Command,
        ),
        (Kind::Plain, PLAIN, good, in_data, End::Cut, Phase::Data),
        (
            Kind::Plain,
            IMPLICIT,
            implicit,
            in_data,
            End::Cut,
            Phase::Data,
        ),
        (
            Kind::Plain,
            PLAIN,
            mute,
            quiet,
            End::Drained,
            Phase::Greeting,
        ),
        (
            Kind::Plain,
            IMPLICIT,
            mute,
            quiet,
            End::Drained,
            Phase::Connect,
        ),
        (
            Kind::Implicit,
            PLAIN,
            good,
            quiet,
            End::Drained,
            Phase::Handshake,
        ),
    ] {
        for panics in [false, true] {
            let lab = lab(kind, server, &[member]);
            let (alone, mut client) = Alone::serve(&lab);
            let talk = thread::spawn(move || {
                client.send(sent);
                let mut said = vec![0; heard.len()];
                client.stream.read_exact(&mut said).unwrap();
                assert_eq!(said, heard.as_bytes());
                client
            });
            let at = Some(phase.as_str().to_owned());
            let seen = || alone.live.views().first().map(|view| view.phase.clone());
            alone.until(|| seen() == at && talk.is_finished());
            if panics {
                alone.fault.notify_one();
                alone.until(|| alone.live.count() == 0);
            }
            drop(alone.runtime);
            let _client = talk.join().unwrap();
            let reported = alone.ends.wait(1);
            assert_eq!((reported.len(), alone.live.count()), (1, 0));
            // What a pump holds behind a panic, nobody asks.
            let code = heard
                .lines()
                .last()
                .map_or(0, |line| line[..3].parse().unwrap());
            let (end, bytes, code) = match panics {
                true => (End::Cut, [0; 2], 0),
                false => (end, [sent.len() as u64, heard.len() as u64], code),
            };
            assert_eq!((reported[0].end, reported[0].phase), (end, phase));
            assert_eq!([reported[0].bytes_in, reported[0].bytes_out], bytes);
            assert_eq!(reported[0].last_code, code);
            assert_eq!(alone.events.snapshot()[end.as_str()], 1);
        }
    }
}

#[test]
fn the_search_for_a_member_has_an_end() {
    for kind in [Kind::Plain, Kind::Implicit] {
        let setup = Setup {
            kind,
            timeouts: Timeouts {
                find_member: Duration::from_millis(500),
                ..Timeouts::DEFAULT
            },
            ..Setup::default()
        };
        // Its greeting does not come; of the other's, nobody gets to know.
        let lab = Lab::made(setup, &[mute, mute]);
        let heard = match kind {
            Kind::Plain => lab.connect().rest(),
            _ => lab.secure(lab.connect()).rest(),
        };
        assert_eq!(heard, NOBODY);
        let end = lab.end();
        assert_eq!((end.end, end.phase), (End::NoMember, Phase::Greeting));
        assert_eq!([lab.seen(), lab.seen()], ["here", "gone"]);
    }
}

/// Greets when it is too late.
fn too_late(member: &mut Member) {
    member.line();
}

fn refuses_for_good(member: &mut Member) {
    member.say("554-no\r\n554 service\r\n");
}

fn refuses_for_now(member: &mut Member) {
    member.say("450 later\r\n");
}

#[test]
fn every_way_not_to_greet_leads_to_the_next_member() {
    let setup = Setup {
        timeouts: Timeouts {
            greeting: Duration::from_millis(500),
            ..Timeouts::DEFAULT
        },
        ..Setup::default()
    };
    let failing = [
        too_late as Script,
        refuses_for_good,
        refuses_for_now,
        super::peers::busy,
        super::peers::dead,
    ];
    let lab = Lab::made(setup, &[&failing[..], &[good]].concat());
    // And one that nobody listens for.
    let service = lab.services.find(lab.address).unwrap();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = closed.local_addr().unwrap();
    drop(closed);
    let absent = LiveMember::new("absent".into(), address, 9, true, super::peers::cell());
    let members = lab.pool.members().iter().cloned();
    let members = [Arc::new(absent)].into_iter().chain(members).collect();
    let pool = LivePool::new("pool".into(), Method::RoundRobin, members);
    lab.services.replace([Arc::new(Service {
        pool: Arc::new(pool),
        ..like(&service)
    })]);
    // Each of them is the first to be asked once; what pipes early is not lost on the way.
    for count in 1..=failing.len() + 2 {
        let mut client = lab.connect();
        client.send("HELO c\r\nQUIT\r\n");
        assert_eq!(client.rest(), b"220 good ESMTP\r\n250 ok\r\n221 bye\r\n");
        let end = lab.ends.wait(count).pop().unwrap();
        assert_eq!((end.end, &*end.member.unwrap().0), (End::Quit, "m5"));
    }
    assert!(lab.events()["member-connect-failed"] > 0);
    assert!(lab.events()["member-passed-over"] > 0);
}
