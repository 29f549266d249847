//! HTTP/1.1 on the admin socket: routing, and the limits that no client can exceed.

use std::{convert::Infallible, sync::Arc, time::Duration};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::{
    net::{UnixListener, UnixStream},
    task::JoinSet,
};

pub use super::socket::{Place, bind, listen_aside};
use super::{
    MemberOrder, Refusal, RefusalKind, Source,
    query::{self, FlowQuery},
    route::{Action, NEXT, Route},
    view::{CountView, Question},
};
use crate::pool::Admin;

/// Serves the admin API until it is dropped; open connections end with it.
pub async fn serve(listener: UnixListener, source: Arc<dyn Source>) {
    serve_within(listener, source, Limits::DEFAULT).await;
}

/// What a client may cost.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// Connections at once; more wait in the kernel's backlog.
    connections: usize,
    /// Bytes of a request's head.
    head: usize,
    /// Header lines of a request.
    headers: usize,
    /// Until the head is complete.
    head_time: Duration,
    /// From accept until the answer is read; a large flow table takes a while.
    total_time: Duration,
}

impl Limits {
    const DEFAULT: Self = Self {
        connections: 32,
        head: 16 * 1024,
        headers: 64,
        head_time: Duration::from_secs(5),
        total_time: Duration::from_secs(120),
    };
}

/// The longest time that connections of a member may be given.
const LONGEST_DEADLINE: Duration = Duration::from_secs(30 * 24 * 3600);

/// Between two tries to accept, when the process has run out of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

async fn serve_within(listener: UnixListener, source: Arc<dyn Source>, limits: Limits) {
    let mut connections = JoinSet::new();
    loop {
        while connections.len() >= limits.connections {
            connections.join_next().await;
        }
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(converse(stream, source.clone(), limits));
                }
                Err(error) => {
                    log::warn!("admin socket: accept: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn converse(stream: UnixStream, source: Arc<dyn Source>, limits: Limits) {
    let service = service_fn(move |request: Request<Incoming>| {
        let source = source.clone();
        async move { Ok::<_, Infallible>(answer(&request, source).await) }
    });
    // One request per connection: nothing idle holds a place.
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_time)
        .max_buf_size(limits.head)
        .max_headers(limits.headers)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(limits.total_time, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => log::debug!("admin socket: {error}"),
        Err(_) => log::debug!("admin socket: a client did not read its answer in time"),
    }
}

async fn answer(request: &Request<Incoming>, source: Arc<dyn Source>) -> Response<Full<Bytes>> {
    let (method, path) = (request.method(), request.uri().path());
    let query = request.uri().query().unwrap_or_default().to_owned();
    let (route, action) = (Route::at(path), Action::at(path));
    let asked = match (route, action) {
        (Some(route), _) if method == Method::GET => Asked::Resource(route),
        (_, Some(action)) if method == Method::POST => Asked::Action(action),
        (None, None) => return fault(StatusCode::NOT_FOUND, "no such resource"),
        (Some(_), None) => return not_allowed("GET", "only GET is allowed here"),
        (None, Some(_)) => return not_allowed("POST", "only POST is allowed here"),
        (Some(_), Some(_)) => {
            return not_allowed("GET, POST", "only GET and POST are allowed here");
        }
    };
    // A source reads kernel tables, which may take long; sessions must not wait for it.
    match tokio::task::spawn_blocking(move || body(asked, &query, &*source)).await {
        Ok(Ok(Body { json: body, next })) => {
            let mut response = json(StatusCode::OK, body);
            if let Some(next) = next {
                response.headers_mut().insert(NEXT, HeaderValue::from(next));
            }
            response
        }
        Ok(Err(refusal)) => {
            let status = StatusCode::from_u16(refusal.kind.status())
                .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            fault(status, &refusal.message)
        }
        Err(error) => {
            log::error!("admin socket: {path}: {error}");
            fault(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the answer could not be made",
            )
        }
    }
}

/// What a request is for.
#[derive(Debug, Clone, Copy)]
enum Asked {
    Resource(Route),
    Action(Action),
}

/// An answer, and where the next portion begins.
struct Body {
    json: Vec<u8>,
    next: Option<u32>,
}

fn body(asked: Asked, query: &str, source: &dyn Source) -> Result<Body, Refusal> {
    let route = match asked {
        Asked::Resource(route) => route,
        Asked::Action(Action::Reload) => return whole(&source.reload(is_dry_run(query)?)?),
        Asked::Action(Action::Member) => {
            return whole(&source.set_member(&member_order(query)?)?);
        }
    };
    let flows = || FlowQuery::from_query(query).map_err(bad_request);
    match route {
        Route::Status => whole(&source.status()),
        Route::VirtualServers => whole(&source.status().virtual_servers),
        Route::Pools => whole(&source.status().pools),
        Route::Members => whole(&source.status().into_members()),
        Route::Flows => {
            let page = source.flows(&flows()?)?;
            Ok(Body {
                next: page.next,
                ..whole(&page.flows)?
            })
        }
        Route::FlowCount => {
            let count = source.count_flows(&flows()?)?;
            whole(&CountView { count })
        }
        Route::Sessions => whole(&source.sessions()),
        Route::Stats => whole(&source.stats()),
        Route::Config => whole(&source.config()),
        Route::Policies => whole(&source.policies()),
        Route::Certificates => whole(&source.certificates()),
        Route::Explain => {
            let question = Question::from_query(query).map_err(bad_request)?;
            whole(&source.explain(&question)?)
        }
    }
}

fn whole(value: &impl Serialize) -> Result<Body, Refusal> {
    let json = serde_json::to_vec(value).map_err(|error| {
        log::error!("admin socket: {error}");
        Refusal::failed("the answer could not be written as JSON")
    })?;
    Ok(Body { json, next: None })
}

fn bad_request(why: String) -> Refusal {
    Refusal::new(RefusalKind::Request, why)
}

fn is_dry_run(query: &str) -> Result<bool, Refusal> {
    let mut dry_run = false;
    for (key, value) in query::pairs(query).map_err(bad_request)? {
        match (key.as_str(), value.as_str()) {
            ("dry_run", "1") => dry_run = true,
            ("dry_run", "0") => dry_run = false,
            _ => {
                return Err(bad_request(format!(
                    "a reload knows no {key:?} = {value:?}"
                )));
            }
        }
    }
    Ok(dry_run)
}

fn member_order(query: &str) -> Result<MemberOrder, Refusal> {
    let (mut name, mut state, mut deadline) = (None, None, None);
    for (key, value) in query::pairs(query).map_err(bad_request)? {
        match key.as_str() {
            "member" => name = Some(value),
            "state" => state = Admin::from_word(&value),
            "deadline_ms" => {
                let number = value.parse().ok().map(Duration::from_millis);
                let within = number.filter(|limit| *limit <= LONGEST_DEADLINE);
                deadline =
                    Some(within.ok_or_else(|| bad_request(format!("deadline_ms = {value:?}")))?);
            }
            _ => return Err(bad_request(format!("a member's state has no {key:?}"))),
        }
    }
    let name = name.as_deref().and_then(|name| name.split_once('/'));
    let (Some((pool, member)), Some(admin)) = (name, state) else {
        let why = "member = POOL/MEMBER and state = ready, drain or maint are needed";
        return Err(bad_request(why.to_owned()));
    };
    Ok(MemberOrder {
        pool: pool.to_owned(),
        member: member.to_owned(),
        admin,
        deadline,
    })
}

fn not_allowed(allow: &'static str, error: &str) -> Response<Full<Bytes>> {
    let mut response = fault(StatusCode::METHOD_NOT_ALLOWED, error);
    response
        .headers_mut()
        .insert(ALLOW, HeaderValue::from_static(allow));
    response
}

/// The body of every answer that is not 200.
#[derive(Serialize)]
struct Fault<'a> {
    error: &'a str,
}

fn fault(status: StatusCode, error: &str) -> Response<Full<Bytes>> {
    json(
        status,
        serde_json::to_vec(&Fault { error }).unwrap_or_default(),
    )
}

fn json(status: StatusCode, body: Vec<u8>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests {
    use std::{io, path::Path};

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        time::timeout,
    };

    use super::*;
    use crate::admin::sample::{FakeSource, GOLDEN};

    const SHORT: Limits = Limits {
        connections: 2,
        head_time: Duration::from_millis(200),
        total_time: Duration::from_millis(600),
        ..Limits::DEFAULT
    };

    /// Serves in the background, in a directory that goes away with the guard.
    fn start(limits: Limits) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        let listener = UnixListener::from_std(bind(&path).unwrap()).unwrap();
        tokio::spawn(serve_within(listener, Arc::new(FakeSource), limits));
        (dir, path)
    }

    /// What the server says to `input`, until it closes. A reset is a close.
    async fn say(path: &Path, input: &[u8]) -> String {
        let mut stream = UnixStream::connect(path).await.unwrap();
        let mut output = Vec::new();
        let exchange = async {
            // The server may close before it has read all.
            let _ = stream.write_all(input).await;
            match stream.read_to_end(&mut output).await {
                Err(error) if error.kind() != io::ErrorKind::ConnectionReset => panic!("{error}"),
                _ => {}
            }
        };
        timeout(Duration::from_secs(10), exchange)
            .await
            .expect("the server neither answers nor closes");
        String::from_utf8(output).unwrap()
    }

    #[tokio::test]
    async fn every_resource_is_served_as_pinned() {
        let (_dir, path) = start(Limits::DEFAULT);
        for (route, golden) in GOLDEN {
            let said = say(
                &path,
                format!("GET {} HTTP/1.1\r\n\r\n", route.path()).as_bytes(),
            )
            .await;
            let (head, body) = said.split_once("\r\n\r\n").unwrap();
            assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
            assert!(head.contains("content-type: application/json"), "{head}");
            let body: serde_json::Value = serde_json::from_str(body).unwrap();
            let golden: serde_json::Value = serde_json::from_str(golden).unwrap();
            assert_eq!(body, golden, "{route:?}");
        }
    }

    #[tokio::test]
    async fn unknown_paths_and_methods_are_refused_in_json() {
        let (_dir, path) = start(Limits::DEFAULT);
        let said = say(&path, b"GET /v2/status HTTP/1.1\r\n\r\n").await;
        assert!(said.starts_with("HTTP/1.1 404 "), "{said}");
        assert!(said.ends_with(r#"{"error":"no such resource"}"#), "{said}");
        let said = say(
            &path,
            b"POST /v1/status HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}",
        )
        .await;
        assert!(said.starts_with("HTTP/1.1 405 "), "{said}");
        assert!(said.contains("allow: GET"), "{said}");
        assert!(
            said.ends_with(r#"{"error":"only GET is allowed here"}"#),
            "{said}"
        );
    }

    #[tokio::test]
    async fn hostile_requests_are_answered_or_closed() {
        let (_dir, path) = start(SHORT);
        let long_line = [b"GET /".as_slice(), &[b'a'; 1 << 20], b" HTTP/1.1\r\n\r\n"].concat();
        let long_header = [
            b"GET /v1/status HTTP/1.1\r\nx: ".as_slice(),
            &[b'a'; 1 << 20],
        ]
        .concat();
        let many_headers = [
            b"GET /v1/status HTTP/1.1\r\n".as_slice(),
            &b"a: b\r\n".repeat(1000),
            b"\r\n",
        ]
        .concat();
        let long_body = [
            b"POST /v1/status HTTP/1.1\r\ncontent-length: 9999999999\r\n\r\n".as_slice(),
            &[0; 1 << 20],
        ]
        .concat();
        let cases: [&[u8]; 7] = [
            &[0xff; 4096],
            b"EHLO client.example\r\nQUIT\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            &long_line,
            &long_header,
            &many_headers,
            &long_body,
        ];
        for input in cases {
            let said = say(&path, input).await;
            assert!(said.is_empty() || said.starts_with("HTTP/1.1 4"), "{said}");
        }
        let said = say(&path, b"GET /v1/status HTTP/1.1\r\n\r\n").await;
        assert!(said.starts_with("HTTP/1.1 200 "), "{said}");
    }

    #[tokio::test]
    async fn slow_clients_lose_their_places() {
        let (_dir, path) = start(SHORT);
        let mut silent = UnixStream::connect(&path).await.unwrap();
        let mut halting = UnixStream::connect(&path).await.unwrap();
        halting.write_all(b"GET /v1/sta").await.unwrap();
        // Both places are taken; this one waits until they are given up.
        let said = say(&path, b"GET /v1/status HTTP/1.1\r\n\r\n").await;
        assert!(said.starts_with("HTTP/1.1 200 "), "{said}");
        for slow in [&mut silent, &mut halting] {
            let mut rest = Vec::new();
            let _ = timeout(Duration::from_secs(10), slow.read_to_end(&mut rest))
                .await
                .unwrap();
        }
    }

    #[tokio::test]
    async fn connections_end_with_the_server() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        let listener = UnixListener::from_std(bind(&path).unwrap()).unwrap();
        let server = tokio::spawn(serve(listener, Arc::new(FakeSource)));
        let mut stream = UnixStream::connect(&path).await.unwrap();
        stream.write_all(b"GET /").await.unwrap();
        tokio::task::yield_now().await;
        server.abort();
        let mut rest = Vec::new();
        let _ = timeout(Duration::from_secs(2), stream.read_to_end(&mut rest))
            .await
            .unwrap();
        assert!(rest.is_empty());
    }
}
