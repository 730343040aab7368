{{- define "serving.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* 63 characters, minus those of `-api-key`, `-metrics` and the suffix that a Deployment adds.
     A longer name ends with its hash: releases whose names begin alike must not share objects. */}}
{{- define "serving.fullname" -}}
{{- $name := .Values.fullnameOverride }}
{{- if not $name }}
{{- $name = contains (include "serving.name" .) .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name (include "serving.name" .)) }}
{{- end }}
{{- if gt (len $name) 52 }}
{{- $name = printf "%s-%s" (trunc 43 $name | trimSuffix "-") (sha256sum $name | trunc 8) }}
{{- end }}
{{- $name }}
{{- end }}

{{/* A Service's name must start with a letter and has no dots, but a release's name may. */}}
{{- define "serving.checkName" -}}
{{- $name := include "serving.fullname" . }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) }}
{{- fail (printf "Services cannot have the name %q: set fullnameOverride to a name of lower-case letters, digits and hyphens that starts with a letter" $name) }}
{{- end }}
{{- end }}

{{/* Selector labels of a Deployment are immutable: add only labels that never change. */}}
{{- define "serving.selectorLabels" -}}
app.kubernetes.io/name: {{ include "serving.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end }}

{{- define "serving.commonLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: infinitecontext
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* `true` if the router divides the requests between this release and the canary; else empty. An Ingress of another controller
than ingress-nginx cannot: its second Ingress would compete with the first one for the same host and path. */}}
{{- define "serving.canaryByRouter" -}}
{{- $edge := ternary (contains "nginx" .Values.ingress.className) .Values.httpRoute.enabled .Values.ingress.enabled }}
{{- if and .Values.canary.service (or (eq .Values.canary.by "router") (and (eq .Values.canary.by "auto") (not $edge))) }}
{{- true }}
{{- end }}
{{- end }}

{{/* `true` if Ingress and HTTPRoute divide them; else empty. */}}
{{- define "serving.canaryByEdge" -}}
{{- if and .Values.canary.service (not (include "serving.canaryByRouter" .)) }}
{{- true }}
{{- end }}
{{- end }}

{{/* Releases behind this one's address, as a list. */}}
{{- define "serving.backends" -}}
{{- $scheme := include "serving.scheme" . }}
{{- $backends := list }}
{{- range .Values.router.backends }}
{{- $secret := .caSecret | default (printf "%s-tls" .service) }}
{{- $backends = append $backends (dict "service" .service "secret" $secret "weight" 100 "url" (printf "%s://%s:%d" $scheme .service (int (.port | default 8000)))) }}
{{- end }}
{{- if include "serving.canaryByRouter" . }}
{{- with .Values.canary }}
{{- $secret := .caSecret | default (printf "%s-tls" .service) }}
{{- $backends = append $backends (dict "service" .service "secret" $secret "weight" (int .weight) "url" (printf "%s://%s:%d" $scheme .service (int .port))) }}
{{- end }}
{{- end }}
{{- toJson $backends }}
{{- end }}

{{- define "serving.checkCanary" -}}
{{- if and (include "serving.backends" . | fromJsonArray) (eq (toString .Values.router.enabled) "false") }}
{{- fail "router.backends, and a canary with canary.by router, require the router, but router.enabled is false: set it to auto" }}
{{- end }}
{{- if and (eq .Values.canary.by "edge") .Values.canary.service (not (or .Values.ingress.enabled .Values.httpRoute.enabled)) }}
{{- fail "canary.by is edge, but neither ingress.enabled nor httpRoute.enabled is true" }}
{{- end }}
{{- if eq .Values.canary.service (include "serving.fullname" .) }}
{{- fail (printf "canary.service: %q is this release: set it to the Service of another one" .Values.canary.service) }}
{{- end }}
{{- $names := list (include "serving.fullname" .) }}
{{- range include "serving.backends" . | fromJsonArray }}
{{- if has .service $names }}
{{- fail (printf "router.backends, canary.service: %q is this release, or listed twice" .service) }}
{{- end }}
{{- $names = append $names .service }}
{{- end }}
{{- end }}

{{/* `true` if requests go through the router; else empty. */}}
{{- define "serving.routed" -}}
{{- $most := ternary .Values.replicaCount .Values.autoscaling.maxReplicas (eq .Values.autoscaling.type "none") | int }}
{{- if or (eq (toString .Values.router.enabled) "true") (and (eq (toString .Values.router.enabled) "auto") (or (gt $most 1) (include "serving.backends" . | fromJsonArray))) }}
{{- true }}
{{- end }}
{{- end }}

{{- define "serving.routerSelectorLabels" -}}
app.kubernetes.io/name: {{ include "serving.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: router
{{- end }}

{{- define "serving.routerLabels" -}}
{{ include "serving.routerSelectorLabels" . }}
{{ include "serving.commonLabels" . }}
{{- end }}

{{/* Selector labels of the pods that clients reach: the router's, or the servers. */}}
{{- define "serving.entryLabels" -}}
{{- if include "serving.routed" . }}
{{- include "serving.routerSelectorLabels" . }}
{{- else }}
{{- include "serving.selectorLabels" . }}
{{- end }}
{{- end }}

{{/* Selector labels of the pods of `helm test`. */}}
{{- define "serving.testLabels" -}}
app.kubernetes.io/name: {{ include "serving.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: test
{{- end }}

{{/* NetworkPolicy peers that may send requests. */}}
{{- define "serving.clients" -}}
- podSelector:
    matchLabels:
      {{- include "serving.testLabels" . | nindent 6 }}
{{- with .Values.networkPolicy.allowFrom }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "serving.labels" -}}
{{ include "serving.selectorLabels" . }}
{{ include "serving.commonLabels" . }}
{{- end }}

{{/* Without the chart's version: a new chart version that does not change the pods must not roll them. */}}
{{- define "serving.podLabels" -}}
{{ include "serving.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: infinitecontext
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* A label value has at most 63 characters, a digest 71: labels contain its first twelve digits. */}}
{{- define "serving.shortDigest" -}}
{{- . | trimPrefix "sha256:" | trunc 12 }}
{{- end }}

{{- define "serving.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{- define "serving.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- .Values.serviceAccount.name | default (include "serving.fullname" .) }}
{{- else }}
{{- .Values.serviceAccount.name | default "default" }}
{{- end }}
{{- end }}

{{- define "serving.apiKeySecret" -}}
{{- .Values.apiKey.existingSecret | default (printf "%s-api-key" (include "serving.fullname" .)) }}
{{- end }}

{{- define "serving.tlsSecret" -}}
{{- .Values.tls.existingSecret | default (printf "%s-tls" (include "serving.fullname" .)) }}
{{- end }}

{{/* Also the name of the port: gateways derive the protocol from it. */}}
{{- define "serving.scheme" -}}
{{- ternary "https" "http" .Values.tls.enabled }}
{{- end }}

{{- define "serving.claimName" -}}
{{- .Values.storage.existingClaim | default (printf "%s-model" (include "serving.fullname" .)) }}
{{- end }}

{{- define "serving.servedName" -}}
{{- .Values.model.servedName | default .Values.model.name }}
{{- end }}

{{- define "serving.modelUri" -}}
{{- if .Values.model.version -}}
models:/{{ .Values.model.name }}/{{ .Values.model.version }}
{{- else -}}
models:/{{ .Values.model.name }}@{{ .Values.model.alias }}
{{- end }}
{{- end }}

{{/* A folder per version: on a shared volume, a rollout must not change files that previous pods still read. */}}
{{- define "serving.modelDir" -}}
/models/{{ .Values.model.name }}/{{ .Values.model.version | default .Values.model.alias }}
{{- end }}

{{- define "serving.trackingPorts" -}}
{{- if .Values.networkPolicy.trackingPorts }}
{{- .Values.networkPolicy.trackingPorts | toJson }}
{{- else }}
{{- $url := urlParse .Values.mlflow.trackingUri }}
{{- $port := regexFind ":[0-9]+$" $url.host | trimPrefix ":" }}
{{- list ($port | default (ternary "443" "80" (eq $url.scheme "https")) | int) | toJson }}
{{- end }}
{{- end }}

{{/* Both are checked, since `helm template --kube-version` changes the version only, not the list of APIs. */}}
{{- define "serving.pdbApiVersion" -}}
{{- if and (.Capabilities.APIVersions.Has "policy/v1") (semverCompare ">=1.21-0" .Capabilities.KubeVersion.Version) -}}
policy/v1
{{- else -}}
policy/v1beta1
{{- end }}
{{- end }}

{{- define "serving.hpaApiVersion" -}}
{{- if and (.Capabilities.APIVersions.Has "autoscaling/v2") (semverCompare ">=1.23-0" .Capabilities.KubeVersion.Version) -}}
autoscaling/v2
{{- else -}}
autoscaling/v2beta2
{{- end }}
{{- end }}

{{- define "serving.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ .Values.security.runAsUser | int64 }}
runAsGroup: {{ .Values.security.runAsGroup | int64 }}
fsGroup: {{ .Values.security.fsGroup | int64 }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: {{ .Values.security.seccompProfile }}
{{- end }}

{{- define "serving.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* The user may not exist in the image: programs that look up its name or home find them here. */}}
{{- define "serving.baseEnv" -}}
- name: HOME
  value: /tmp
- name: USER
  value: ictx
- name: LOGNAME
  value: ictx
{{- end }}

{{- define "serving.keysVolume" -}}
# A folder, not variables: kubelet updates it when the Secret changes, and the running server uses the new keys.
- name: keys
  projected:
    defaultMode: 0440
    sources:
      - secret:
          name: {{ include "serving.apiKeySecret" . }}
          items: [{key: {{ .Values.apiKey.key }}, path: api-key}]
      - secret:
          name: {{ include "serving.apiKeySecret" . }}
          items: [{key: {{ .Values.apiKey.previousKey }}, path: api-key-previous}]
          optional: true
{{- end }}

{{/* Checks that the schema cannot express. */}}
{{- define "serving.check" -}}
{{- include "serving.checkName" . }}
{{- if and (gt (int .Values.gpu.count) 0) (gt (int .Values.vllm.tensorParallelSize) (int .Values.gpu.count)) }}
{{- fail (printf "vllm.tensorParallelSize is %d, but gpu.count is %d" (int .Values.vllm.tensorParallelSize) (int .Values.gpu.count)) }}
{{- end }}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) }}
{{- fail "autoscaling.minReplicas is larger than autoscaling.maxReplicas" }}
{{- end }}
{{- include "serving.checkExtra" . }}
{{- include "serving.checkAdapters" . }}
{{- include "serving.checkCanary" . }}
{{- include "serving.checkDtype" . }}
{{- include "serving.checkFit" . }}
{{- include "serving.checkOffload" . }}
{{- end }}

{{/* Type of the Service that clients reach, and the settings that depend on it. */}}
{{- define "serving.serviceType" -}}
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
{{- define "serving.ingressAnnotations" -}}
{{- $annotations := deepCopy .Values.ingress.annotations }}
{{- if contains "nginx" .Values.ingress.className }}
{{- $defaults := dict "proxy-body-size" "64m" "proxy-read-timeout" (print .Values.router.requestTimeoutSeconds) "proxy-send-timeout" (print .Values.router.requestTimeoutSeconds) }}
{{- if .Values.tls.enabled }}
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
