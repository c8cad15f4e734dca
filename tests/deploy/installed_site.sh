# A site of the installed packages, each program as its own user, the way docs/installation.md says; watched by Prometheus with
# deploy/monitoring (here /mnt). Its last line says that all went well.
state=/var/lib/farpoint
cd /tmp

as() { # USER COMMAND…
  runuser -u "$1" -- "${@:2}"
}

refused() { # COMMAND…; why: a command behind ! never ends a script
  if "$@" >/dev/null 2>&1; then
    echo "should have been refused: $*"
    exit 1
  fi
}

until_true() { # SECONDS COMMAND…
  local end=$((SECONDS + $1))
  until "${@:2}" >/tmp/until 2>&1; do
    if ((SECONDS > end)); then
      echo "not within $1 s: ${*:2}"
      cat /tmp/until /tmp/*.log
      exit 1
    fi
    sleep 0.3
  done
}

answers() { # PORT PATH
  python3 -c 'import sys, urllib.request as u; print(u.urlopen("http://127.0.0.1:" + sys.argv[1] + sys.argv[2]).read().decode())' "$@"
}

# The vault, and the configuration server.
install -d -o root /srv/farpoint /tmp/keys
farpoint vault init --store file:///srv/farpoint/store --recovery-key /tmp/keys/1.key --recovery-key /tmp/keys/2.key
config-server init --authority-key /tmp/keys/vault-authority.key
rm /tmp/keys/vault-authority.key
as farpoint-config-server config-server run --set point_interval_seconds=1 --set copy_interval_seconds=1 >/tmp/config-server.log 2>&1 &
until_true 60 answers 9466 /readyz
operator=(--server https://localhost:8443 --ca $state/config-server/authority.pem --token-file $state/config-server/admin-token)

# The process server.
chown -R farpoint-process-server: /srv/farpoint/store
farpoint token create --role process-server "${operator[@]}" --output /tmp/process-server.token
process-server enroll --server https://localhost:8443 --token-file /tmp/process-server.token
as farpoint-process-server process-server run --set host=127.0.0.1 --set cache_bytes_max=1073741824 >/tmp/process-server.log 2>&1 &
until_true 60 answers 9465 /readyz

# The agent, and a disk.
head -c 8388608 /dev/urandom >/srv/disk.img
farpoint token create --role agent "${operator[@]}" --output /tmp/agent.token
mobility-agent enroll --server https://localhost:8443 --token-file /tmp/agent.token
mobility-agent protect /srv/disk.img
mobility-agent run >/tmp/mobility-agent.log 2>&1 &
until_true 60 answers 9464 /readyz

# Neither server can read what is the other's, nor the agent's.
refused as farpoint-process-server cat $state/config-server/vault-authority-key.json
refused as farpoint-config-server ls $state/process-server
refused as farpoint-process-server ls $state/mobility-agent

# Prometheus, with the configuration that is shipped.
install -d -o prometheus /tmp/prometheus
cp /mnt/prometheus.yml /mnt/alerts.yml /tmp/prometheus/
sed -i 's/15s/1s/' /tmp/prometheus/prometheus.yml
as prometheus prometheus --config.file=/tmp/prometheus/prometheus.yml --storage.tsdb.path=/tmp/prometheus/data \
  --web.listen-address=127.0.0.1:9090 >/tmp/prometheus.log 2>&1 &

all_are_scraped() {
  answers 9090 '/api/v1/query?query=sum(up%7Bjob%3D~%22farpoint-.%2B%22%7D)' | grep -F '"3"]'
}
rpo_is_kept() {
  answers 9090 '/api/v1/query?query=farpoint_config_server_disks%7Brpo%3D%22ok%22%7D' | grep -F '"1"]'
}
until_true 60 all_are_scraped
until_true 90 rpo_is_kept
for port in 9464 9465 9466; do
  answers $port /metrics | promtool check metrics
done
answers 9090 '/api/v1/alerts' | python3 -c '
import json, sys
firing = [one["labels"]["alertname"] for one in json.load(sys.stdin)["data"]["alerts"] if one["state"] == "firing"]
sys.exit(f"firing: {firing}" if firing else 0)'

# Recovery from the store and a key file alone.
disk=$(farpoint disks "${operator[@]}" -o json | python3 -c 'import json, sys; print(json.load(sys.stdin)[0]["disk"])')
farpoint recover --store file:///srv/farpoint/store --recovery-key /tmp/keys/1.key --disk "$disk" --point latest --to /tmp/disk.img
cmp /srv/disk.img /tmp/disk.img

# An orderly end.
kill %4 %3 %2 %1
wait %3 && wait %2 && wait %1
rm -r /srv/farpoint /srv/disk.img
echo "the site is well"
