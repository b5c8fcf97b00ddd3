"""A small EC2 instance metadata service (version 2 only) for images/selftest, on 127.0.0.1:80.

Usage: imds.py PUBLIC-KEY-FILE MAC IPV4
"""

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY, MAC, ADDRESS = open(sys.argv[1]).read(), sys.argv[2], sys.argv[3]
TOKEN = "selftest-token"
USER_DATA = """#cloud-config
runcmd:
  - echo "IMAGE-TEST user-data ran" >/dev/console
"""
TREE = {
    "meta-data": {
        "ami-id": "ami-0123456789abcdef0",
        "instance-id": "i-0123456789abcdef0",
        "instance-type": "m1.small",
        "hostname": "ip-test.ec2.internal",
        "local-hostname": "ip-test.ec2.internal",
        "local-ipv4": ADDRESS,
        "mac": MAC,
        "placement": {"availability-zone": "local-1a", "region": "local-1"},
        "public-keys": {"0": {"openssh-key": KEY}},
        "security-groups": "default",
        "network": {
            "interfaces": {
                "macs": {
                    MAC: {
                        "device-number": "0",
                        "interface-id": "eni-0123456789abcdef0",
                        "local-ipv4s": ADDRESS,
                        "mac": MAC,
                        "subnet-ipv4-cidr-block": "169.254.169.0/24",
                    }
                }
            }
        },
    },
    "dynamic": {"instance-identity": {"document": '{"instanceId": "i-0123456789abcdef0"}'}},
    "user-data": USER_DATA,
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, body=""):
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_PUT(self):
        if self.path == "/latest/api/token" and self.headers.get("X-aws-ec2-metadata-token-ttl-seconds"):
            self.answer(200, TOKEN)
        else:
            self.answer(400)

    def do_GET(self):
        if self.headers.get("X-aws-ec2-metadata-token") != TOKEN:
            return self.answer(401)
        node = TREE
        for name in self.path.strip("/").split("/")[1:]:  # the first one is the version
            if not isinstance(node, dict) or name not in node:
                return self.answer(404)
            node = node[name]
        if not isinstance(node, dict):
            return self.answer(200, node)
        if self.path.rstrip("/").endswith("public-keys"):
            return self.answer(200, "0=selftest")
        leaf = lambda value: not isinstance(value, dict) or "openssh-key" in value
        self.answer(200, "\n".join(name if leaf(value) else name + "/" for name, value in node.items()))


ThreadingHTTPServer(("127.0.0.1", 80), Handler).serve_forever()
