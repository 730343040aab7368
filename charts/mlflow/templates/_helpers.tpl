{{- define "mlflow.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* 63 characters, minus those of `-restore-20260131t021500z`.
     A longer name ends with its hash: releases whose names begin alike must not share objects. */}}
{{- define "mlflow.fullname" -}}
{{- $name := .Values.fullnameOverride }}
{{- if not $name }}
{{- $name = contains (include "mlflow.name" .) .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name (include "mlflow.name" .)) }}
{{- end }}
{{- if gt (len $name) 38 }}
{{- $name = printf "%s-%s" (trunc 29 $name | trimSuffix "-") (sha256sum $name | trunc 8) }}
{{- end }}
{{- $name }}
{{- end }}

{{/* A Service's name must start with a letter and has no dots, but a release's name may. */}}
{{- define "mlflow.checkName" -}}
{{- $name := include "mlflow.fullname" . }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) }}
{{- fail (printf "Services cannot have the name %q: set fullnameOverride to a name of lower-case letters, digits and hyphens that starts with a letter" $name) }}
{{- end }}
{{- end }}

{{/* Selector labels of a Deployment are immutable: add only labels that never change. */}}
{{- define "mlflow.selectorLabels" -}}
app.kubernetes.io/name: {{ include "mlflow.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end }}

{{- define "mlflow.commonLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: infinitecontext
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "mlflow.labels" -}}
{{ include "mlflow.selectorLabels" . }}
{{ include "mlflow.commonLabels" . }}
{{- end }}

{{/* Without the chart's version: a new chart version that does not change the pods must not roll them. */}}
{{- define "mlflow.podLabels" -}}
{{ include "mlflow.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: infinitecontext
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* A label value has at most 63 characters, a digest 71: labels contain its first twelve digits. */}}
{{- define "mlflow.shortDigest" -}}
{{- . | trimPrefix "sha256:" | trunc 12 }}
{{- end }}

{{- define "mlflow.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{- define "mlflow.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- .Values.serviceAccount.name | default (include "mlflow.fullname" .) }}
{{- else }}
{{- .Values.serviceAccount.name | default "default" }}
{{- end }}
{{- end }}

{{/* Both are checked, since `helm template --kube-version` changes the version only, not the list of APIs. */}}
{{- define "mlflow.pdbApiVersion" -}}
{{- if and (.Capabilities.APIVersions.Has "policy/v1") (semverCompare ">=1.21-0" .Capabilities.KubeVersion.Version) -}}
policy/v1
{{- else -}}
policy/v1beta1
{{- end }}
{{- end }}

{{- define "mlflow.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ .Values.security.runAsUser | int64 }}
runAsGroup: {{ .Values.security.runAsGroup | int64 }}
fsGroup: {{ .Values.security.fsGroup | int64 }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: {{ .Values.security.seccompProfile }}
{{- end }}

{{- define "mlflow.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* The user may not exist in the image: programs that look up its name or home find them here. */}}
{{- define "mlflow.baseEnv" -}}
- name: HOME
  value: /tmp
- name: USER
  value: ictx
- name: LOGNAME
  value: ictx
{{- end }}

{{- define "mlflow.cronJobApiVersion" -}}
{{- /* batch/v1 had Jobs before it had CronJobs, so the group's version alone does not suffice. */}}
{{- if or (.Capabilities.APIVersions.Has "batch/v1/CronJob") (semverCompare ">=1.21-0" .Capabilities.KubeVersion.Version) -}}
batch/v1
{{- else -}}
batch/v1beta1
{{- end }}
{{- end }}

{{- define "mlflow.authSecret" -}}
{{- .Values.auth.existingSecret | default (printf "%s-auth" (include "mlflow.fullname" .)) }}
{{- end }}

{{- define "mlflow.claimName" -}}
{{- .Values.persistence.existingClaim | default (printf "%s-data" (include "mlflow.fullname" .)) }}
{{- end }}

{{- define "mlflow.backupClaimName" -}}
{{- .Values.backup.existingClaim | default (printf "%s-backup" (include "mlflow.fullname" .)) }}
{{- end }}

{{/* "true" or nothing: whether the data volume is used. */}}
{{- define "mlflow.hasVolume" -}}
{{- if or (eq .Values.database.type "sqlite") (eq .Values.artifacts.type "pvc") }}true{{ end }}
{{- end }}

{{/* A volume that one node mounts at a time (SQLite's locks require this): all pods that use it run on the server's node. */}}
{{- define "mlflow.besideServer" -}}
{{- if and (include "mlflow.hasVolume" .) (not (has "ReadWriteMany" .Values.persistence.accessModes)) }}true{{ end }}
{{- end }}

{{- define "mlflow.scheme" -}}
{{- ternary "https" "http" (ne .Values.tls.existingSecret "") }}
{{- end }}

{{- define "mlflow.url" -}}
{{ include "mlflow.scheme" . }}://{{ include "mlflow.fullname" . }}:{{ .Values.service.port | int }}
{{- end }}

{{- define "mlflow.artifactsDestination" -}}
{{- if eq .Values.artifacts.type "s3" }}{{ .Values.artifacts.s3.uri }}{{ else }}/data/artifacts{{ end }}
{{- end }}

{{/* MLflow rejects other host names (DNS rebinding). A list replaces its defaults, so they are repeated here. */}}
{{- define "mlflow.allowedHosts" -}}
{{- $name := include "mlflow.fullname" . }}
{{- $bare := list "localhost" "127.0.0.1" $name }}
{{- range list "" ".svc" ".svc.cluster.local" }}
{{- $bare = append $bare (printf "%s.%s%s" $name $.Release.Namespace .) }}
{{- end }}
{{- if .Values.ingress.enabled }}
{{- $bare = append $bare .Values.ingress.host }}
{{- end }}
{{- if .Values.httpRoute.enabled }}
{{- $bare = concat $bare .Values.httpRoute.hostnames }}
{{- end }}
{{- with .Values.auth.oidc.url }}
{{- $bare = append $bare (urlParse .).hostname }}
{{- end }}
{{- $hosts := list }}
{{- range $bare }}
{{- $hosts = concat $hosts (list . (printf "%s:*" .)) }}
{{- end }}
{{- if .Values.server.allowPrivateAddresses }}
{{- $hosts = concat $hosts (list "10.*" "192.168.*" "100.6[4-9].*" "100.[789]?.*" "100.1[01]?.*" "100.12[0-7].*" "[[]f[cd]*") }}
{{- range untilStep 16 32 1 }}
{{- $hosts = append $hosts (printf "172.%d.*" .) }}
{{- end }}
{{- end }}
{{- concat $hosts .Values.server.allowedHosts | join "," }}
{{- end }}

{{/* MLflow rejects changes, and searches, by pages of other origins; it does not recognize its own. */}}
{{- define "mlflow.allowedOrigins" -}}
{{- $origins := .Values.server.corsAllowedOrigins }}
{{- if .Values.ingress.enabled }}
{{- $origins = append $origins (printf "https://%s" .Values.ingress.host) }}
{{- if not .Values.ingress.tlsSecret }}
{{- $origins = append $origins (printf "http://%s" .Values.ingress.host) }}
{{- end }}
{{- end }}
{{- if .Values.httpRoute.enabled }}
{{- range .Values.httpRoute.hostnames }}
{{- $origins = append $origins (printf "https://%s" .) }}
{{- $origins = append $origins (printf "http://%s" .) }}
{{- end }}
{{- end }}
{{- with .Values.auth.oidc.url }}
{{- $origins = append $origins (printf "%s://%s" (urlParse .).scheme (urlParse .).host) }}
{{- end }}
{{- $origins | uniq | join "," }}
{{- end }}

{{/* URIs of PostgreSQL contain a password: they come from the Secret and never appear in arguments. */}}
{{- define "mlflow.databaseEnv" -}}
- name: MLFLOW_BACKEND_STORE_URI
{{- if eq .Values.database.type "postgresql" }}
  valueFrom:
    secretKeyRef:
      name: {{ .Values.database.postgresql.existingSecret }}
      key: {{ .Values.database.postgresql.uriKey }}
{{- else }}
  value: sqlite:////data/mlflow.db
{{- end }}
{{- if include "mlflow.databaseAuthority" . }}
# Defaults of libpq: `sslmode` in the URI takes precedence.
- name: PGSSLROOTCERT
  value: /etc/mlflow-database/ca.crt
- name: PGSSLMODE
  value: verify-full
{{- end }}
{{- if .Values.auth.enabled }}
- name: AUTH_DATABASE_URI
{{- if eq .Values.database.type "postgresql" }}
  valueFrom:
    secretKeyRef:
      name: {{ .Values.database.postgresql.existingSecret }}
      key: {{ .Values.database.postgresql.authUriKey | default .Values.database.postgresql.uriKey }}
{{- else }}
  value: sqlite:////data/basic_auth.db
{{- end }}
{{- end }}
{{- end }}

{{- define "mlflow.artifactsEnv" -}}
- name: MLFLOW_ARTIFACTS_DESTINATION
  value: {{ include "mlflow.artifactsDestination" . | quote }}
{{- if eq .Values.artifacts.type "s3" }}
{{- with .Values.artifacts.s3 }}
{{- if .endpointUrl }}
- name: MLFLOW_S3_ENDPOINT_URL
  value: {{ .endpointUrl | quote }}
{{- end }}
{{- if .region }}
- name: AWS_DEFAULT_REGION
  value: {{ .region | quote }}
{{- end }}
{{- if .existingSecret }}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ . }}
  valueFrom:
    secretKeyRef:
      name: {{ $.Values.artifacts.s3.existingSecret }}
      key: {{ . }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* Name and password of the administrator, in the variables that MLflow's client reads. */}}
{{- define "mlflow.clientEnv" -}}
- name: MLFLOW_TRACKING_URI
  value: {{ include "mlflow.url" . }}
{{- if .Values.tls.existingSecret }}
- name: MLFLOW_TRACKING_SERVER_CERT_PATH
  value: /etc/mlflow-ca/ca.crt
{{- end }}
{{- if .Values.auth.enabled }}
- name: MLFLOW_TRACKING_USERNAME
  valueFrom:
    secretKeyRef:
      name: {{ include "mlflow.authSecret" . }}
      key: admin-username
- name: MLFLOW_TRACKING_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ include "mlflow.authSecret" . }}
      key: admin-password
{{- end }}
{{- end }}

{{/* Settings common to all pods of the release. */}}
{{- define "mlflow.podBase" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
securityContext:
  {{- include "mlflow.podSecurityContext" . | nindent 2 }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Settings common to all containers. */}}
{{- define "mlflow.containerBase" -}}
image: {{ include "mlflow.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  {{- include "mlflow.containerSecurityContext" . | nindent 2 }}
terminationMessagePolicy: FallbackToLogsOnError
{{- end }}

{{/* Labels of pods that are not servers: no Service may select them. Arguments: root, component. */}}
{{- define "mlflow.jobLabels" -}}
{{- $root := index . 0 }}
app.kubernetes.io/name: {{ include "mlflow.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{ include "mlflow.commonLabels" $root }}
{{- end }}

{{/* The pods of the release that are not servers. */}}
{{- define "mlflow.jobsSelector" -}}
matchLabels:
  app.kubernetes.io/name: {{ include "mlflow.name" . }}
  app.kubernetes.io/instance: {{ .Release.Name }}
matchExpressions:
  - {key: app.kubernetes.io/component, operator: NotIn, values: [server]}
{{- end }}

{{/* Port rules of an egress rule: the ports of a list, and that of a URL. Arguments: list, URL. */}}
{{- define "mlflow.egressPorts" -}}
{{- $ports := first . }}
{{- with urlParse (last .) }}
{{- $port := regexFind ":[0-9]+$" .host | trimPrefix ":" | default (get (dict "http" "80" "https" "443") .scheme) }}
{{- if $port }}
{{- $ports = append $ports $port }}
{{- end }}
{{- end }}
{{- range $index, $port := $ports | toStrings | uniq }}
{{- if $index }}{{ "\n" }}{{ end -}}
- {port: {{ $port }}, protocol: TCP}
{{- end }}
{{- end }}

{{/* Egress rules for DNS, database and artifacts. */}}
{{- define "mlflow.storesEgress" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- if eq .Values.database.type "postgresql" }}
- ports:
    {{- range .Values.networkPolicy.databasePorts }}
    - {port: {{ . | int }}, protocol: TCP}
    {{- end }}
{{- end }}
{{- if eq .Values.artifacts.type "s3" }}
- ports:
    {{- include "mlflow.egressPorts" (list .Values.networkPolicy.s3Ports .Values.artifacts.s3.endpointUrl) | nindent 4 }}
{{- if not .Values.artifacts.s3.existingSecret }}
# Amazon's endpoints that provide the credentials of a node's role (.254) and of EKS Pod Identity (.23).
- ports:
    - {port: 80, protocol: TCP}
  to:
    {{- range list "169.254.169.254/32" "169.254.170.23/32" "fd00:ec2::254/128" "fd00:ec2::23/128" }}
    - ipBlock: {cidr: {{ . | quote }}}
    {{- end }}
{{- end }}
{{- end }}
{{- with .Values.networkPolicy.extraEgress }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "mlflow.serverAffinity" -}}
affinity:
  podAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      - topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels:
            {{- include "mlflow.selectorLabels" . | nindent 12 }}
{{- end }}

{{- define "mlflow.dataVolume" -}}
{{- if include "mlflow.hasVolume" . }}
- name: data
  persistentVolumeClaim:
    claimName: {{ include "mlflow.claimName" . }}
{{- end }}
{{- end }}

{{- define "mlflow.backupVolume" -}}
- name: backup
  persistentVolumeClaim:
    claimName: {{ include "mlflow.backupClaimName" . }}
{{- end }}

{{/* The authority with which clients verify the server: its volume and mount. */}}
{{- define "mlflow.authorityVolume" -}}
{{- with .Values.tls.existingSecret }}
- name: authority
  secret:
    secretName: {{ . }}
    items: [{key: ca.crt, path: ca.crt}]
{{- end }}
{{- end }}

{{- define "mlflow.authorityMount" -}}
{{- if .Values.tls.existingSecret }}
- name: authority
  mountPath: /etc/mlflow-ca
  readOnly: true
{{- end }}
{{- end }}

{{/* Name of the Secret with the authority of the database's certificate; empty without one. Its volume and mount. */}}
{{- define "mlflow.databaseAuthority" -}}
{{- if eq .Values.database.type "postgresql" }}
{{- .Values.database.postgresql.caSecret }}
{{- end }}
{{- end }}

{{- define "mlflow.databaseVolume" -}}
{{- with include "mlflow.databaseAuthority" . }}
- name: database
  secret:
    secretName: {{ . }}
    items: [{key: ca.crt, path: ca.crt}]
{{- end }}
{{- end }}

{{- define "mlflow.databaseMount" -}}
{{- if include "mlflow.databaseAuthority" . }}
- name: database
  mountPath: /etc/mlflow-database
  readOnly: true
{{- end }}
{{- end }}

{{/* Name and password of the administrator, in the variables that MLflow's server reads. */}}
{{- define "mlflow.adminEnv" -}}
- name: MLFLOW_AUTH_CONFIG_PATH
  value: /run/mlflow/basic_auth.ini
- name: MLFLOW_AUTH_ADMIN_USERNAME
  valueFrom:
    secretKeyRef:
      name: {{ include "mlflow.authSecret" . }}
      key: admin-username
- name: MLFLOW_AUTH_ADMIN_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ include "mlflow.authSecret" . }}
      key: admin-password
{{- end }}

{{- define "mlflow.gracePeriod" -}}
{{- add (int .Values.server.drainSeconds) (int .Values.server.stopTimeoutSeconds) 10 }}
{{- end }}

{{/* Type of the Service that clients reach, and the settings that depend on it. */}}
{{- define "mlflow.serviceType" -}}
{{- with .Values.service -}}
type: {{ .type }}
{{- if and .externalTrafficPolicy (ne .type "ClusterIP") }}
externalTrafficPolicy: {{ .externalTrafficPolicy }}
{{- end }}
{{- if eq .type "LoadBalancer" }}
{{- with .loadBalancerClass }}
loadBalancerClass: {{ . }}
{{- end }}
{{- with .loadBalancerSourceRanges }}
loadBalancerSourceRanges:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- with .ipFamilyPolicy }}
ipFamilyPolicy: {{ . }}
{{- end }}
{{- with .ipFamilies }}
ipFamilies:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{/* Annotations of the Ingress. ingress-nginx sends plain HTTP, and limits requests to 1 MiB and 60 seconds, unless they are set. */}}
{{- define "mlflow.ingressAnnotations" -}}
{{- $annotations := deepCopy .Values.ingress.annotations }}
{{- if contains "nginx" .Values.ingress.className }}
{{- $defaults := dict "proxy-body-size" "0" "proxy-request-buffering" "off" }}
{{- if .Values.tls.existingSecret }}
{{- $_ := set $defaults "backend-protocol" "HTTPS" }}
{{- end }}
{{- range $key, $value := $defaults }}
{{- $annotations = merge $annotations (dict (printf "nginx.ingress.kubernetes.io/%s" $key) $value) }}
{{- end }}
{{- end }}
{{- if $annotations }}
{{- toYaml $annotations }}
{{- end }}
{{- end }}
